"""Arguments of wrong types in the Python interface are refused by name, not by an error from inside."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cloudrt
from cloudrt.arguments import check_grid, check_number, check_path, shown
from cloudrt.inference.task import InferTask
from cloudrt.options import RemoteOptions, RunOptions

MAP = np.zeros((4, 5), np.uint8)
RULES = [cloudrt.Rule(1, 1)]
WRONG: tuple[Any, ...] = (None, 5, float("nan"), "a", b"a", {}, object(), np.zeros(2))
"""Values of several types; most arguments take none of them."""
NO_PATHS: tuple[Any, ...] = ("nul\0", *WRONG[1:3], *WRONG[4:])
"""Values that are no paths; None, which some arguments take, is not among them."""


def task(**settings: Any) -> InferTask:
    return InferTask(("in",), **settings)


CALLS: dict[str, tuple[Callable[[Any], object], tuple[Any, ...]]] = {
    "classes": (lambda v: cloudrt.Labels(classes=v), (*WRONG, "Fish", (["a"],), ())),
    "label_grid": (lambda v: cloudrt.Labels(label_grid=v), (*WRONG, [4, 4])),
    "from_dict": (cloudrt.Labels.from_dict, ({1: 2, "a": 3}, {"classes": [[1]]})),
    "provider": (lambda v: RunOptions(provider=v), WRONG),
    "threads": (lambda v: RunOptions(threads=v), ("a", 10**5000)),
    "options": (RunOptions.from_dict, (None, 5)),
    "urls": (lambda v: RemoteOptions(urls=v, model="m"), (*WRONG, "http://a", (5,))),
    "remote.model": (lambda v: RemoteOptions(urls=("http://a",), model=v), (None, 5, b"a", np.zeros(2))),
    "remote.rules": (lambda v: RemoteOptions(rules=v), (None, 5, b"a", np.zeros(2))),
    "probability": (lambda v: cloudrt.postprocess(v, 1, 1), (*WRONG, [[1, 2]])),
    "threshold": (lambda v: cloudrt.postprocess(MAP, v, 1), (None, *WRONG[2:], True, 10**400, 10**5000, 1j)),
    "min_area": (lambda v: cloudrt.postprocess(MAP, 1, v), (None, *WRONG[2:], True, 10**400)),
    "text": (lambda v: cloudrt.rle_decode(v, (4, 5)), (None, 5, b"1 1", [])),
    "shape": (
        lambda v: cloudrt.rle_decode("", v),
        (*WRONG, (4,), (4.0, 5), (-1, 5), "45", (True, 3), (2**40, 2**40)),
    ),
    "mask": (cloudrt.rle_encode, (*WRONG, [[1]])),
    "dice": (lambda v: cloudrt.dice(v, MAP), (*WRONG, [[1]])),
    "levels": (lambda v: cloudrt.apply_rules(v, RULES), WRONG),
    "rules": (lambda v: cloudrt.apply_rules(MAP[None], v), (*WRONG, [(1, 1)], [None])),
    "presence": (lambda v: cloudrt.apply_rules(MAP[None], RULES, v), WRONG[1:]),
    "pool": (lambda v: cloudrt.postprocess_batch(MAP[None, None], RULES, None, v), (None, 1.5, "2", True, 0)),
    "submission_csv": (lambda v: cloudrt.score(v, "t.csv"), (None, *NO_PATHS)),
    "truth_csv": (lambda v: cloudrt.score("s.csv", v), (None, *NO_PATHS)),
    "labels": (lambda v: cloudrt.score("s.csv", "t.csv", v), WRONG),
    "truth_grid": (lambda v: cloudrt.score("s.csv", "t.csv", truth_grid=v), (*WRONG[1:], (), (1, 2, 3))),
    "artifact": (cloudrt.read_artifact, (None, *NO_PATHS)),
    "model": (cloudrt.Segmenter, NO_PATHS),
    "inputs": (cloudrt.infer, (None, 5, object(), [None], [b"in"], [], "", "nul\0")),
    "output": (lambda v: cloudrt.infer("in", v), (None, 5, b"a.csv", "nul\0.csv")),
    "progress": (lambda v: cloudrt.infer("in", progress=v), (None, 5)),
    "format": (lambda v: task(format=v), (5, None, [])),
    "resume": (lambda v: task(resume=v), ("no", 1, None)),
    "overwrite": (lambda v: task(overwrite=v), ("no", 1, None)),
    "tile": (lambda v: task(tile=v), ("no", 1, None)),
    "report_images": (lambda v: task(report_images=v), ("3", 1.5, -1, True)),
    "overlap": (lambda v: task(tile=True, overlap=v), ("0.5", [], 0.95)),
    "bounds": (lambda v: task(tile=True, bounds=v), ("1,2,3,4", (1, 2, 3), ("a",) * 4, (None,) * 4)),
    "simplify": (lambda v: task(output=Path("o.geojson"), simplify=v), ("0.5", float("nan"), -1)),
    "results": (cloudrt.to_dataframe, (None, 5, [5])),
}
"""Name of an argument or a function -> a call with the value of the argument, and values that it must refuse."""
WORDS = {
    "classes": "classes must be|class name must be",
    "label_grid": "a grid must be",
    "from_dict": "unknown keys|class name must be",
    "urls": r"remote\.urls must be",
    "probability": "a probability map must be",
    "min_area": "the min area must be",
    "text": "an RLE text must be",
    "mask": "a mask must be",
    "dice": "masks? must",
    "levels": r"levels must be|one \(W, H\) map",
    "pool": "threads must be",
    "artifact": "path must be a path",
    "inputs": "inputs|an input is",
}
"""What the message says instead of the name of the argument."""


@pytest.mark.parametrize(
    ("call", "place"), [(call, n) for call, (_, values) in CALLS.items() for n in range(len(values))]
)
def test_a_wrong_argument_is_refused(call: str, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((cloudrt.DataError, cloudrt.RleError, cloudrt.ArtifactError)) as caught:
        CALLS[call][0](CALLS[call][1][place])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert re.search(WORDS.get(call, call), str(caught.value)), str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_list_of_classes_is_a_tuple() -> None:
    assert cloudrt.Labels(["Fish", "Flower"]) == cloudrt.Labels(("Fish", "Flower"))  # type: ignore[arg-type]


def test_a_segmenter_refuses_wrong_arguments(model: Path) -> None:
    with cloudrt.Segmenter(model, provider="cpu", batch_size=1, threads=1) as segmenter:
        for look in (5, "a"):
            with pytest.raises(cloudrt.DataError, match="look must be a function"):
                segmenter.predict([], look)  # type: ignore[arg-type]
    (result,) = [cloudrt.Result("a", {"Fish": ""}, None, cloudrt.Labels(("Fish",)))]
    for size in (None, (1.5, 2), ("a", 2), (2**40, 2**40), np.zeros(2)):
        with pytest.raises(cloudrt.DataError, match="size must be"):
            result.mask("Fish", size)  # type: ignore[arg-type]
    wrong: Any
    for wrong in ({"plan": 5}, {"plan": {}}, {"samples": []}):
        with pytest.raises(cloudrt.DataError, match="must be"):
            cloudrt.Segmenter(model, provider="cpu", batch_size=1, threads=1, **wrong)


def test_valid_values_are_returned() -> None:
    assert check_number("n", np.float32(2.5)) == 2.5 and check_number("n", 3) == 3
    assert check_grid("g", (np.int64(4), 5)) == (4, 5) and check_grid("g", [0, 5]) == (0, 5)
    assert check_path("p", Path("a")) == check_path("p", "a") == Path("a")
    assert shown(10**5000) == "a value of type int" and len(shown("x" * 1000)) == 100
