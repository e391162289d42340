"""Images that raise an error or end the worker fail alone, without a cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.identity import make_identity
from support.tiny import SMALL_GRIDS

from cloudrt.cluster.isolation import Ledger, PartitionState, segment
from cloudrt.cluster.listing import ListedImage
from cloudrt.cluster.nodes import ClusterError
from cloudrt.images.image import ImageFile
from cloudrt.inference.identity import Identity
from cloudrt.inference.journal_records import Record
from cloudrt.inference.results import Result

LABELS = SMALL_GRIDS


class Fragile:
    """A predictor of batches of 4 that raises, exits or continues, depending on the keys of the images."""

    batch_size, labels = 4, LABELS

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def predict(self, inputs: Iterable[Any]) -> Iterator[Result]:
        for one in inputs:
            if self.broken:
                raise RuntimeError("no engine")
            if isinstance(one, np.ndarray):
                yield Result("black", dict.fromkeys(LABELS.classes, ""), None, LABELS)
                continue
            if one.key.startswith("raise"):
                raise ValueError(f"{one.key} is odd")
            if one.key.startswith("kill"):
                raise KeyboardInterrupt  # not caught: it ends the worker
            yield Result(one.key, dict.fromkeys(LABELS.classes, f"1 {len(one.key)}"), None, LABELS)

    def identity(self) -> Identity:
        return make_identity()


def run(keys: list[str]) -> tuple[list[Record], int]:
    """Run a partition again until no worker exits."""
    images = [ListedImage(key, -1, key, 0) for key in keys]
    ledger, deaths = Ledger(), 0
    while True:
        care = ledger.begin(7)
        try:
            found = segment(
                Fragile(), images, [image.source([]) for image in images], care, lambda at: ledger.note(7, at)
            )
        except KeyboardInterrupt:
            deaths += 1
            assert deaths < 20
            continue
        ledger.finish(7, {"images": len(found)})
        assert ledger.begin(7).done == {"images": len(found)}
        return found, deaths


@pytest.mark.parametrize(
    ("bad", "deaths"),
    [([], 0), (["raise"], 0), (["kill"], 3), (["raise", "raise2", "kill"], 1), (["kill", "kill2"], 5)],
)
def test_images_that_raise_or_kill_fail_alone(bad: list[str], deaths: int) -> None:
    keys = [f"{i:02}" for i in range(10)]
    for place, key in zip((5, 2, 6), bad, strict=False):
        keys[place] = key
    found, died = run(keys)
    assert [record.key for record in found] == keys
    assert died == deaths
    for record in found:
        if record.key in bad:
            assert record.texts == ("",) * 3
            reason = (
                "crashes the process" if record.key.startswith("kill") else f"cannot be segmented: {record.key} is odd"
            )
            assert reason in str(record.error)
        else:
            assert record == Record(record.key, (f"1 {len(record.key)}",) * 3, None, 0)


def test_a_broken_engine_is_not_a_failure_of_images() -> None:
    images = [ListedImage("a", -1, "a", 0)]
    with pytest.raises(RuntimeError, match="no engine"):
        segment(Fragile(broken=True), images, [ImageFile("a", Path("a"))], PartitionState(), lambda _: None)


def test_a_worker_that_dies_while_it_writes_the_rows_does_not_blame_the_last_image() -> None:
    images = [ListedImage(key, -1, key, 0) for key in ["kill", *"abcdefgh"]]  # the last batch has one image
    inputs = [image.source([]) for image in images]
    ledger = Ledger()
    for _ in range(3):  # the whole partition, its first batch, the image
        with pytest.raises(KeyboardInterrupt):
            segment(Fragile(), images, inputs, ledger.begin(7), lambda at: ledger.note(7, at))
    with pytest.raises(ClusterError, match="partition 7: 6 workers were lost before or after its images ran"):
        for _ in range(20):
            state = ledger.begin(7)
            assert state.crashed == {0}
            segment(Fragile(), images, inputs, state, lambda at: ledger.note(7, at))
