"""The pipeline as an iterator: lazy inputs, bounded memory, closing early, errors, and stages that overlap."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.plain import picture

from cloudrt.engines.onnxruntime import OrtEngine
from cloudrt.errors import ProviderError
from cloudrt.images.decoding import Decoding
from cloudrt.inference.pipeline import Segmenter
from cloudrt.system.statistics import StageStats

IN_FLIGHT = 3 + 2 + 2 + 1
"""Groups that a run with one engine holds: being decoded, inferred, post-processed, and handed out."""


def test_inputs_are_read_lazily_and_memory_stays_flat(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most the inputs of the groups in flight are read ahead of the results."""
    monkeypatch.setattr("cloudrt.system.overlap.HANDOVER_S", 0)  # a group is one batch
    read = handed = most = 0

    def inputs() -> Iterator[NDArray[np.uint8]]:
        nonlocal read
        image = picture(0)
        for _ in range(10_000):
            read += 1
            yield image

    with Segmenter(model, provider="cpu", batch_size=8, threads=2) as segmenter:
        for _ in segmenter.predict(inputs()):
            handed += 1
            most = max(most, read - handed)
            if handed == 1_000:
                break
    assert most <= 8 * IN_FLIGHT


def test_failures_do_not_make_the_pipeline_read_further_ahead(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloudrt.system.overlap.HANDOVER_S", 0)
    read = handed = most = 0

    def inputs() -> Iterator[bytes]:
        nonlocal read
        for _ in range(1_000):
            read += 1
            yield b""

    with Segmenter(model, provider="cpu", batch_size=8, threads=2) as segmenter:
        for _ in segmenter.predict(inputs()):
            handed += 1
            most = max(most, read - handed)
    assert handed == 1_000
    assert most <= 8 * IN_FLIGHT


def test_an_early_close_ends_the_threads(model: Path) -> None:
    before = threading.active_count()
    closed = False

    def inputs() -> Iterator[NDArray[np.uint8]]:
        nonlocal closed
        try:
            while True:
                yield picture(200)
        finally:
            closed = True

    with Segmenter(model, provider="cpu", threads=2) as segmenter:
        results = segmenter.predict(inputs())
        assert next(results).error is None
        assert isinstance(results, Iterator)
        results.close()
        assert threading.active_count() == before
        # The same segmenter can be used afterwards.
        assert len(list(segmenter.predict([picture(1)] * 3))) == 3
    del results
    assert closed


def test_a_close_does_not_wait_for_batches_that_have_not_started(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three batches run before the first result; the fourth is held in the engine while the caller closes."""
    runs = 0
    gate = threading.Event()
    real = OrtEngine.run

    def held(self: OrtEngine, batch: NDArray[np.uint8]) -> object:
        nonlocal runs
        runs += 1
        if runs > 3:
            gate.wait(10)
        return real(self, batch)

    monkeypatch.setattr(OrtEngine, "run", held)
    with Segmenter(model, provider="cpu", batch_size=1, threads=1) as segmenter:
        results = segmenter.predict(picture(1) for _ in range(1_000))
        next(results)
        threading.Timer(0.3, gate.set).start()
        results.close()
    assert runs <= 4


def test_an_error_of_the_inputs_or_the_engine_reaches_the_caller(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()

    def inputs() -> Iterator[NDArray[np.uint8]]:
        yield from [picture(1)] * 30
        raise LookupError("the caller's own")

    with Segmenter(model, provider="cpu") as segmenter:
        with pytest.raises(LookupError, match="the caller's own"):
            list(segmenter.predict(inputs()))

        def fail(self: OrtEngine, batch: NDArray[np.uint8]) -> object:
            raise ProviderError("out of memory")

        monkeypatch.setattr(OrtEngine, "run", fail)
        with pytest.raises(ProviderError, match="out of memory"):
            list(segmenter.predict([picture(1)] * 30))
    assert threading.active_count() == before


def test_stages_overlap(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine waits in its first batch until a later image is decoded, which waits for the engine to start."""
    began, decoded = threading.Event(), threading.Event()
    met: list[bool] = []
    real = OrtEngine.run

    def run(self: OrtEngine, batch: NDArray[np.uint8]) -> object:
        began.set()
        met.append(decoded.wait(5))
        return real(self, batch)

    def load(source: bytes, size: object, most: object, out: NDArray[np.uint8]) -> None:
        if int(source) >= 2:
            met.append(began.wait(5))
            decoded.set()
        out[:] = picture(1)

    monkeypatch.setattr(OrtEngine, "run", run)
    monkeypatch.setattr("cloudrt.images.decoding.load_image", load)
    with Segmenter(model, provider="cpu", batch_size=2, threads=2) as segmenter:
        assert len(list(segmenter.predict(str(number).encode() for number in range(20)))) == 20
    assert all(met)


@pytest.mark.parametrize(("seconds", "largest"), [(0.0, 16), (0.01, 5), (1.0, 1), (1e-6, 50)])
def test_a_thread_decodes_for_a_short_time_per_call(seconds: float, largest: int) -> None:
    """Closing a run waits for the calls that have started; each decodes `largest` images at most."""
    stats = StageStats(2)
    if seconds:
        stats.add(seconds, 10)
    parts: list[int] = []

    class Noted(Decoding):
        def _decode(self, part: Any) -> Any:
            parts.append(len(part.inputs))
            return super()._decode(part)

    with ThreadPoolExecutor(2) as pool:
        list(Noted((8, 8), 100, stats).run([b""] * 100, pool, lambda: np.empty((100, 8, 8, 3), np.uint8), 1))
    assert max(parts) == largest and sum(parts) == 100
