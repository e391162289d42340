"""Copying, computing and post-processing overlap, shown by batches that wait for each other; groups of batches."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.gpu_session import OnTheCpu, stand_in_for_a_gpu
from support.plain import SIZE, pictures, plain_answers

from cloudrt.engines.base import EngineOptions
from cloudrt.engines.onnxruntime import OrtEngine
from cloudrt.engines.pool import EnginePool
from cloudrt.inference.pipeline import Segmenter
from cloudrt.masks.postprocess import Maps
from cloudrt.model.artifact import parse_artifact
from cloudrt.model.onnx_file import load_model
from cloudrt.system.cuda import HostDevice
from cloudrt.system.overlap import Pace

BATCHES, SIZE_OF_BATCH = 12, 4


class Watched(HostDevice):
    """Counts the batches that each stage has begun; `meet` waits until a stage begins a batch.

    In the test, computing batch n waits until the copy of n + 1 begins, and post-processing n until the computation of
    n + 1 begins.
    """

    def __init__(self) -> None:
        self.begun: dict[tuple[str, int], threading.Event] = defaultdict(threading.Event)
        self.counts: dict[str, int] = defaultdict(int)
        self.missed: list[tuple[str, int]] = []
        self.lock, self.warm = threading.Lock(), False

    def begin(self, stage: str) -> int:
        with self.lock:
            number = self.counts[stage]
            self.counts[stage] += 1
        self.begun[stage, number].set()
        return number

    def meet(self, stage: str, number: int) -> None:
        if number < BATCHES and not self.begun[stage, number].wait(2):
            self.missed.append((stage, number))

    def copy(self, target: int, source: int, size: int, stream: None) -> None:
        if self.warm and size == SIZE_OF_BATCH * SIZE[0] * SIZE[1] * 3:
            self.begin("copy")
        super().copy(target, source, size, stream)


@pytest.mark.parametrize("options", [EngineOptions(), EngineOptions(cuda_graph=True), EngineOptions(streams=2)])
def test_copies_computing_and_postprocessing_overlap(
    model: Path, monkeypatch: pytest.MonkeyPatch, options: EngineOptions
) -> None:
    images = pictures(BATCHES * SIZE_OF_BATCH)
    loaded = load_model(model)
    artifact = parse_artifact(loaded, model)
    wanted = [plain_answers(model, one, artifact.rules) for one in images]
    device = Watched()
    stand_in_for_a_gpu(monkeypatch, device)
    compute, finish = OnTheCpu.run_with_iobinding, Segmenter.texts

    def run_with_iobinding(self: OnTheCpu, *words: Any) -> None:
        if device.warm:
            device.meet("copy", device.begin("compute") + 1)
        compute(self, *words)

    def texts(self: Segmenter, batches: Sequence[Maps]) -> list[str]:
        device.meet("compute", device.begin("postprocess") + 1)
        return finish(self, batches)

    monkeypatch.setattr(OnTheCpu, "run_with_iobinding", run_with_iobinding)
    monkeypatch.setattr(Segmenter, "texts", texts)
    monkeypatch.setattr("cloudrt.system.overlap.HANDOVER_S", 0)  # a group is one batch
    with Segmenter(model, provider="cpu", batch_size=1, threads=1) as segmenter:
        segmenter.pool.close()
        segmenter.pool = EnginePool(
            lambda _, size: OrtEngine(loaded, artifact, "cuda", size, 1, options), (0,), SIZE_OF_BATCH
        )
        device.warm = True
        results = list(segmenter.predict(images))
    assert dict(device.counts) == dict.fromkeys(("copy", "compute", "postprocess"), BATCHES)
    # If the system suspends a thread between copying and computing, others overtake it, and some waits time out.
    assert len(device.missed) <= BATCHES // 3, "without overlap, every batch is missed"
    assert [result.rle for result in results] == wanted


@pytest.mark.parametrize("batches", [1, 3, 50])
def test_answers_do_not_depend_on_how_many_batches_are_handed_over(
    model: Path, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    """Failures anywhere, a last batch that is not full: each image keeps its batch."""
    monkeypatch.setattr(Pace, "batches", lambda self, size: batches)
    inputs: list[Any] = [*pictures(30)]
    inputs[0:0], inputs[8:8], inputs[20:20] = [b"no image"], [b"none"] * 9, [b"nor this"]
    runs: list[int] = []
    run = OrtEngine.run

    def counted(self: OrtEngine, batch: NDArray[np.uint8]) -> Any:
        runs.append(len(batch))
        return run(self, batch)

    monkeypatch.setattr(OrtEngine, "run", counted)
    with Segmenter(model, provider="cpu", batch_size=4, threads=3) as segmenter:
        looked: list[str] = []
        results = list(segmenter.predict(inputs, lambda item: looked.append(item.image)))
        rules = segmenter.artifact.rules
        assert segmenter.stats["postprocess"].count == 30
        assert segmenter.stats["decode"].count == 41
    assert runs == [4] * 9  # of 11: two hold nothing but failures
    assert looked == [result.image for result in results] == [f"image-{number}" for number in range(41)]
    for number, (image, result) in enumerate(zip(inputs, results, strict=True)):
        assert (result.batch, result.batch_size) == (number // 4 * 4, 4)
        assert (result.error is not None) == isinstance(image, bytes)
        if not isinstance(image, bytes):
            assert result.rle == plain_answers(model, image, rules)
