"""Engines in a pool: several devices, several batches on one engine, and closing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.plain import SIZE, picture, pictures, plain_answers
from support.tiny import SMALL_GRIDS, tiny_model

from cloudrt.engines.base import EngineOptions
from cloudrt.engines.choice import open_engine
from cloudrt.engines.onnxruntime import OrtEngine
from cloudrt.engines.plan import Plan
from cloudrt.engines.pool import EnginePool
from cloudrt.errors import ProviderError
from cloudrt.inference.pipeline import Segmenter
from cloudrt.model.artifact import parse_artifact


@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_a_closed_segmenter_says_so(model: Path, provider: str) -> None:
    if provider == "openvino":
        pytest.importorskip("openvino")
    segmenter = Segmenter(model, provider=provider, batch_size=2)
    running = segmenter.predict(pictures(40))
    next(running)
    segmenter.close()
    for results in (running, segmenter.predict([picture(1)])):
        with pytest.raises(ProviderError, match="the engines are closed"):
            list(results)


def test_closing_waits_for_running_batches_and_refuses_waiting_ones() -> None:
    """An engine that is released while it runs crashes, or returns freed memory."""
    artifact = parse_artifact(tiny_model(SIZE, SMALL_GRIDS), "m")
    began, go_on = threading.Event(), threading.Event()
    happened: list[str] = []

    class Slow:
        streams, batch_size = 1, 2

        def __init__(self) -> None:
            self.artifact = artifact

        def run(self, batch: NDArray[np.uint8]) -> Any:
            began.set()
            go_on.wait(20)
            happened.append("ran")
            return np.zeros((len(batch), *artifact.output_shape), np.uint8), None

        def close(self) -> None:
            happened.append("closed")

    pool = EnginePool(lambda device, size: Slow(), (0,), 2)  # type: ignore[arg-type,return-value]

    def work() -> None:
        try:
            pool.run([picture(1)])
        except ProviderError:
            happened.append("refused")

    threads = [threading.Thread(target=work, daemon=True)]
    threads[0].start()
    assert began.wait(20)
    threads += [threading.Thread(target=one, daemon=True) for one in (work, pool.close)]
    for thread in threads[1:]:
        thread.start()
    threads[1].join(20)  # waiting batches are refused at once
    assert happened == ["refused"]
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert happened == ["refused", "ran", "closed"]
    pool.close()


def test_several_batches_take_one_engine_and_give_it_back() -> None:
    """The engine is returned even if the generator is closed early."""
    artifact = parse_artifact(tiny_model(SIZE, SMALL_GRIDS), "m")
    used: list[int] = []

    class Counted:
        streams, batch_size = 1, 2

        def __init__(self, device: int) -> None:
            self.artifact, self.device = artifact, device

        def run(self, batch: NDArray[np.uint8]) -> Any:
            used.append(self.device)
            return np.full((len(batch), *artifact.output_shape), len(used), np.uint8), None

        def close(self) -> None: ...

    pool = EnginePool(lambda device, size: Counted(device), (0, 1), 2)  # type: ignore[arg-type,return-value]
    batches = [[picture(1)] * size for size in (2, 1, 2)]
    outputs = pool.run_each(batches)
    first = next(outputs)[0]
    assert first.max() == 1 and len(first) == 2
    pool.run([picture(1)])
    assert [len(levels) for levels, _ in outputs] == [1, 2]
    assert used == [0, 1, 0, 0]
    early = pool.run_each(batches)
    next(early)
    early.close()
    pool.resize(1)  # waits until every engine is free
    assert [len(levels) for levels, _ in pool.run_each([[picture(1)]] * 3)] == [1, 1, 1]


def test_openvinos_table_of_types_is_filled_by_one_thread(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two first look-ups of a type at the same time deadlock, so the engine looks one up when it is opened."""
    pytest.importorskip("openvino")
    looked: list[int] = []

    class Type:
        class u8:
            @staticmethod
            def to_dtype() -> None:
                looked.append(threading.get_ident())

    monkeypatch.setattr("cloudrt.engines.openvino.openvino.Type", Type)
    with open_engine(model, "openvino", 2):
        assert looked == [threading.get_ident()]


def test_every_device_works_behind_one_decoder_and_the_order_stays(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two engines must be in `run` at the same time, or the barrier breaks."""
    meet = threading.Barrier(2, timeout=10)
    opened: list[int] = []
    real = OrtEngine.run

    def open_here(loaded: Any, provider: str, size: int, threads: int, options: EngineOptions) -> OrtEngine:
        opened.append(options.device)
        return OrtEngine(loaded, parse_artifact(loaded, "m"), "cpu", size, 1)

    def run(self: OrtEngine, batch: NDArray[np.uint8]) -> object:
        meet.wait()
        return real(self, batch)

    monkeypatch.setattr(OrtEngine, "run", run)
    monkeypatch.setattr("cloudrt.inference.model_source.open_engine", open_here)
    monkeypatch.setattr("cloudrt.inference.model_source.make_plan", lambda *words: words[3])
    monkeypatch.setattr("cloudrt.system.overlap.HANDOVER_S", 0)  # a group is one batch
    images = pictures(24)
    with Segmenter(model, devices=(3, 5), plan=Plan("cuda", 2), threads=2) as segmenter:
        results = list(segmenter.predict(images))
        assert segmenter.stats["infer"].threads == 2
        rules = segmenter.artifact.rules
    assert opened == [3, 5]
    assert [result.image for result in results] == [f"image-{number}" for number in range(24)]
    assert [result.rle for result in results] == [plain_answers(model, one, rules) for one in images]


def test_a_device_that_cannot_open_closes_the_others() -> None:
    closed: list[int] = []

    class Opened:
        streams, batch_size = 1, 2

        def __init__(self, device: int) -> None:
            self.device = device

        def close(self) -> None:
            closed.append(self.device)

    def open_one(device: int, size: int) -> Any:
        if device == 2:
            raise ProviderError("no GPU 2")
        return Opened(device)

    with pytest.raises(ProviderError, match="no GPU 2"):
        EnginePool(open_one, (0, 1, 2), 2)
    assert closed == [0, 1]
