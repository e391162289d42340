"""Which batch sizes and numbers of streams are measured, and when the measurements stop."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.tiny import SMALL_GRIDS, tiny_model

from cloudrt.engines.candidates import FixedSettings, Setting, best_setting
from cloudrt.engines.trial import COMPARED, ProviderTrial, measure_rate
from cloudrt.errors import MemoryExhausted
from cloudrt.model.artifact import parse_artifact

MODEL = tiny_model(labels=SMALL_GRIDS)
ARTIFACT = parse_artifact(MODEL, "model.onnx")


class Simulated:
    """An engine whose batch of N images takes (`fixed` + `each` * N) / `streams` seconds of a simulated clock."""

    def __init__(self, setting: Setting, clock: list[float], fixed: float, each: float) -> None:
        self.batch_size, self.streams = setting.batch_size, setting.streams
        self._clock, self._seconds = clock, fixed + each * setting.batch_size

    def empty(self, batches: int) -> NDArray[np.uint8]:
        return np.empty((batches * self.batch_size, *ARTIFACT.input_size, 3), np.uint8)

    def run(self, batch: NDArray[np.uint8]) -> None:
        self._clock[0] += self._seconds / self.streams

    def __enter__(self) -> Simulated:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Setting]]:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def measure_settings(
        provider: str, fixed: float, each: float, threads: int = 4, most: int = 1000, asked: int = 0
    ) -> Any:
        def open_one(self: ProviderTrial, provider: str, precision: str, setting: Setting) -> Simulated:
            if setting.batch_size > most:
                raise MemoryExhausted("no memory")
            return Simulated(setting, clock, fixed, each)

        monkeypatch.setattr(ProviderTrial, "open", open_one)
        return ProviderTrial(MODEL, ARTIFACT, threads).measure_settings(
            provider, "fp32", FixedSettings(batch_size=asked)
        )

    return measure_settings


@pytest.mark.parametrize("size", [(32, 64), (32, 32)])
def test_providers_are_compared_on_networks_smaller_than_a_scene(size: tuple[int, int]) -> None:
    model = tiny_model(size, SMALL_GRIDS)
    trial = ProviderTrial(model, parse_artifact(model, "model.onnx"), 1)
    assert trial.images.shape == (COMPARED, *size, 3)
    assert trial.images.any((1, 2, 3)).all()
    assert trial.disagreement("cpu", "fp32") is None


def test_measurements_stop_if_larger_batches_gain_nothing(simulate: Callable[..., list[Setting]]) -> None:
    settings = simulate("cpu", fixed=0.0, each=0.01)
    assert [setting.batch_size for setting in settings] == [1, 2, 4]
    assert best_setting(settings) == Setting(1, 1, False, 100.0)
    settings = simulate("cpu", fixed=0.1, each=0.001)
    assert [setting.batch_size for setting in settings] == [1, 2, 4, 8]
    best = best_setting(settings)
    assert best and best.batch_size == 8
    assert best.images_per_s == pytest.approx(8 / 0.108, rel=1e-3)


def test_measurements_stop_without_memory_or_time(simulate: Callable[..., list[Setting]]) -> None:
    assert [setting.batch_size for setting in simulate("cpu", fixed=0.1, each=0.001, most=4)] == [1, 2, 4]
    assert simulate("cpu", fixed=0.1, each=0.001, most=0) == []
    # A batch of one image takes 3 s, one of two takes 5 s: the time that is left is too short for three of the latter.
    slow = simulate("cpu", fixed=1.0, each=2.0)
    assert [setting.batch_size for setting in slow] == [1]


def test_streams_come_first_then_batches_then_a_graph(simulate: Callable[..., list[Setting]]) -> None:
    settings = simulate("openvino", fixed=0.001, each=0.01)
    assert [(setting.batch_size, setting.streams) for setting in settings[:3]] == [(1, 1), (1, 2), (1, 4)]
    assert {setting.streams for setting in settings[3:]} == {4}
    settings = simulate("cuda", fixed=0.01, each=0.001)
    assert [(setting.batch_size, setting.streams) for setting in settings[:2]] == [(8, 1), (8, 2)]
    assert settings[-1].cuda_graph and settings[-1].streams == 1
    settings = simulate("cuda", fixed=0.01, each=0.001, asked=24)
    assert {setting.batch_size for setting in settings} == {24}
    assert [setting.pinned for setting in settings].count(False) == 1


def test_plain_copies_are_taken_where_they_are_faster() -> None:
    plain = Setting(8, 2, images_per_s=20.0, pinned=False)
    assert best_setting([Setting(8, 2, images_per_s=10.0), plain]) is plain
    assert Setting.read([plain.to_dict()]) == [plain]
    assert Setting.read([{"batch_size": 8, "images_per_s": 2.0}]) == [
        Setting(8, images_per_s=2.0)
    ]  # of an earlier version


def test_all_streams_are_at_work_when_they_are_timed() -> None:
    meet = threading.Barrier(3, timeout=10)

    class Together:
        streams = 3

        def empty(self, batches: int) -> NDArray[np.uint8]:
            return np.empty((2 * batches, 4, 4, 3), np.uint8)

        def run(self, batch: NDArray[np.uint8]) -> None:
            meet.wait()  # raises unless three threads wait here

    assert measure_rate(Together(), np.zeros((2, 4, 4, 3), np.uint8)) > 0  # type: ignore[arg-type]


def test_a_rate_is_measured_with_outputs_in_reused_memory() -> None:
    """As in the pipeline: allocating page-locked memory for each output would take longer than the batch."""
    lock, alive, most = threading.Lock(), [0], [0]

    def gone() -> None:
        with lock:
            alive[0] -= 1

    class Arrays(Simulated):
        def run(self, batch: NDArray[np.uint8]) -> Any:
            found = np.zeros(8, np.uint8)
            weakref.finalize(found, gone)
            with lock:
                alive[0] += 1
                most[0] = max(most[0], alive[0])
            return found

    assert measure_rate(Arrays(Setting(2, 3), [0.0], 0.0, 0.0), make_batch(2)) > 0  # type: ignore[arg-type]
    assert 1 <= most[0] <= 6


def make_batch(size: int) -> NDArray[np.uint8]:
    return np.zeros((size, *ARTIFACT.input_size, 3), np.uint8)
