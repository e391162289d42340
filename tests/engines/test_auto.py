"""`--provider auto`: repeatable, on enough images, and without building a TensorRT engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from support.tiny import SMALL_GRIDS, tiny_artifact, tiny_model, write_jpeg

from cloudrt.data.scenes import make_samples
from cloudrt.engines import trial as trial_module
from cloudrt.engines.base import BATCH_SIZES
from cloudrt.engines.candidates import NOTHING_FIXED, Candidate, FixedSettings, Setting
from cloudrt.engines.choice import open_engine
from cloudrt.engines.plan import MARGIN, Plan, make_plan
from cloudrt.engines.trial import COMPARED, ProviderTrial
from cloudrt.errors import ProviderError
from cloudrt.images.image import ImageFile
from cloudrt.images.inputs import load_sample
from cloudrt.inference.pipeline import Segmenter
from cloudrt.inference.run import infer
from cloudrt.masks.rule import Rule
from cloudrt.model.artifact import parse_artifact, write_metadata
from cloudrt.model.parity import TOLERANCES
from cloudrt.options import CudaOptions, RunOptions, TensorrtRtxOptions
from cloudrt.system.nvidia import Driver

MODEL = tiny_model(labels=SMALL_GRIDS)
ARTIFACT = parse_artifact(MODEL, "model.onnx")
OTHER = tiny_model((96, 64), SMALL_GRIDS)
OTHER_ARTIFACT = parse_artifact(OTHER, "other.onnx")
SIZE = ARTIFACT.input_size

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Setting]]:
    """All providers but OpenVINO work, simulated by ONNX Runtime's CPU provider; returns what is opened."""
    found: list[tuple[str, Setting]] = []

    def open_here(self: ProviderTrial, provider: str, precision: str, setting: Setting) -> Any:
        found.append((provider, setting))
        return open_engine(self.model, "cpu", setting.batch_size, 1)

    monkeypatch.setattr(ProviderTrial, "open", open_here)
    monkeypatch.setattr("cloudrt.engines.choice.problem", lambda name: None if name != "openvino" else "not here")
    monkeypatch.setattr(trial_module, "SHORTEST_S", 1e-6)
    monkeypatch.setattr(
        "cloudrt.engines.plan.nvidia_driver", lambda: Driver((13, 0), ("NVIDIA H200, 140 GiB",), ((9, 0),))
    )
    return found


def test_auto_builds_no_tensorrt_engine(opened: list[tuple[str, Setting]], monkeypatch: pytest.MonkeyPatch) -> None:
    make_plan(MODEL, ARTIFACT, RunOptions())
    assert opened and "tensorrt" not in {provider for provider, _ in opened}
    opened.clear()
    # Its engine for batches of 32 exists: the comparison and the measurements open no other batch size.
    monkeypatch.setattr("cloudrt.engines.session.tensorrt_engine_exists", lambda *words: words[1] == 32)
    make_plan(OTHER, OTHER_ARTIFACT, RunOptions())
    sizes = [setting.batch_size for provider, setting in opened if provider == "tensorrt"]
    assert len(sizes) >= 3 and set(sizes) == {32}
    opened.clear()
    make_plan(OTHER, OTHER_ARTIFACT, RunOptions(batch_size=16))
    assert "tensorrt" not in {provider for provider, _ in opened}
    monkeypatch.setattr("cloudrt.engines.session.tensorrt_engine_exists", lambda *words: words[1] == 16)
    make_plan(OTHER, OTHER_ARTIFACT, RunOptions(batch_size=16))
    assert {setting.batch_size for provider, setting in opened if provider == "tensorrt"} == {16}


def test_tensorrt_rtx_takes_part(opened: list[tuple[str, Setting]]) -> None:
    """It compiles in seconds, and runs one batch at a time."""
    make_plan(MODEL, ARTIFACT, RunOptions())
    settings = [setting for provider, setting in opened if provider == "tensorrt-rtx"]
    assert {setting.batch_size for setting in settings} == {BATCH_SIZES["tensorrt-rtx"]}
    assert {setting.streams for setting in settings} == {1}
    assert {setting.cuda_graph for setting in settings} == {False, True}
    assert not any(setting.channels_last for setting in settings)
    fixed = RunOptions(provider="tensorrt-rtx", tensorrt_rtx=TensorrtRtxOptions(graph=True))
    chosen = make_plan(MODEL, ARTIFACT, fixed)
    assert chosen.cuda_graph and chosen.satisfies(fixed)


def test_the_layout_of_convolutions_is_measured_on_cuda(opened: list[tuple[str, Setting]]) -> None:
    make_plan(MODEL, ARTIFACT, RunOptions(provider="cuda", batch_size=8))
    assert [setting.channels_last for _, setting in opened].count(True) >= 1
    opened.clear()
    for asked in (False, True):
        options = RunOptions(provider="cuda", batch_size=8, cuda=CudaOptions(channels_last=asked))
        chosen = make_plan(MODEL, ARTIFACT, options)
        assert {setting.channels_last for _, setting in opened} == {asked}
        assert chosen.channels_last is asked and chosen.satisfies(options)
        assert chosen.options().channels_last is asked
        opened.clear()


def test_new_rules_measure_nothing(opened: list[tuple[str, Setting]]) -> None:
    """The choice does not depend on what `cloudrt tune` changes."""
    first = make_plan(MODEL, ARTIFACT, RunOptions())
    opened.clear()
    tuned = onnx.ModelProto.FromString(MODEL.SerializeToString())
    artifact = replace(ARTIFACT, rules=(Rule(99, 7),) * len(ARTIFACT.labels.classes))
    write_metadata(tuned, artifact)
    assert make_plan(tuned, artifact, RunOptions()) == first
    assert not opened


def empty_rows(monkeypatch: pytest.MonkeyPatch, rows: int) -> str | None:
    """Return the disagreement of a provider that empties the first class of `rows` images."""
    left = [rows]

    class Emptying:
        batch_size = 4
        streams = 1

        def __init__(self) -> None:
            self.engine = open_engine(MODEL, "cpu", 4, 1)

        def run(self, batch: NDArray[np.uint8]) -> Any:
            probability, presence = self.engine.run(batch)
            for image in probability:
                if left[0] and (image[0] > 127).sum() > 20:
                    image[0] = np.minimum(image[0], 127)
                    left[0] -= 1
            return probability, presence

        def __enter__(self) -> Emptying:
            return self

        def __exit__(self, *_: object) -> None:
            self.engine.close()

    monkeypatch.setattr(ProviderTrial, "open", lambda *_: Emptying())
    monkeypatch.setitem(TOLERANCES, "fp32", replace(TOLERANCES["fp32"], mean_difference=255, dice=0))
    trial = ProviderTrial(MODEL, ARTIFACT, 1)
    return trial.disagreement("openvino", "fp32")


def test_the_comparison_measures_half_a_percent_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 images of three classes have 192 rows: one of them is 0.52%, beyond the limit of 0.5%."""
    classes = len(ARTIFACT.labels.classes)
    assert COMPARED >= 64
    assert empty_rows(monkeypatch, 0) is None
    allowed = int(0.005 * COMPARED * classes)
    if allowed:
        assert empty_rows(monkeypatch, allowed) is None
    reason = empty_rows(monkeypatch, allowed + 1)
    assert reason and "rows empty in one submission only" in reason


def test_samples_are_different_pictures() -> None:
    samples = make_samples(COMPARED, SIZE)
    assert samples.shape == (COMPARED, *SIZE, 3)
    assert len({image.tobytes() for image in samples}) == COMPARED
    assert (make_samples(3, SIZE) == samples[:3]).all()


def test_the_users_images_are_compared_where_there_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    model = tiny_artifact(tmp_path / "model.onnx", labels=SMALL_GRIDS)
    files = [write_jpeg(tmp_path / "images" / f"{number:02}.jpg", number, (70, 105)) for number in range(COMPARED + 3)]
    (tmp_path / "images" / "00.jpg").write_bytes(b"damaged")
    seen: list[NDArray[np.uint8]] = []
    real = ProviderTrial.disagreement

    def look(self: ProviderTrial, provider: str, precision: str) -> str | None:
        seen.append(self.images)
        return real(self, provider, precision)

    monkeypatch.setattr(ProviderTrial, "disagreement", look)
    infer(tmp_path / "images", tmp_path / "s.csv", model)
    loaded = load_sample(files, SIZE, COMPARED)
    assert len(loaded) == COMPARED - 1  # without the damaged one, which a scene replaces
    assert (seen[0][:-1] == loaded).all()
    assert (seen[0][-1] == make_samples(1, SIZE)[0]).all()
    seen.clear()
    with Segmenter(model):  # has no images: the stored comparison is used
        assert not seen
    few = tmp_path / "few"
    few.mkdir()
    (tmp_path / "images" / "01.jpg").rename(few / "01.jpg")
    infer(few, tmp_path / "few.csv", model)
    assert not seen
    assert load_sample([ImageFile("x", tmp_path / "none.jpg")], SIZE, 4).shape == (0, *SIZE, 3)


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """OpenVINO and the CPU work and agree; tests set their rates and the ratio here."""
    found: dict[str, float] = {"openvino": 1.0, "cpu": 1.0, "ratio": 1.0, "timed alternately": 0}
    monkeypatch.setattr("cloudrt.engines.choice.problem", lambda name: None if name in found else f"no {name}")
    monkeypatch.setattr(ProviderTrial, "disagreement", lambda *_: None)

    def measure_settings(
        self: ProviderTrial, provider: str, precision: str, given: FixedSettings = NOTHING_FIXED
    ) -> list[Setting]:
        return [Setting(4, 1, False, found[provider])]

    def compare(self: ProviderTrial, one: Candidate, other: Candidate) -> float:
        assert (one.provider, other.provider) == ("openvino", "cpu")
        found["timed alternately"] += 1
        return found["ratio"]

    monkeypatch.setattr(ProviderTrial, "measure_settings", measure_settings)
    monkeypatch.setattr(ProviderTrial, "compare", compare)
    return found


@pytest.mark.parametrize(
    ("openvino", "ratio", "taken"),
    [(11.5, 1.04, "cpu"), (9.0, 1.2, "openvino"), (11.5, 1.2, "openvino"), (9.0, 0.9, "cpu")],
)
def test_another_provider_wins_by_a_margin_beyond_noise(
    rates: dict[str, float], openvino: float, ratio: float, taken: str
) -> None:
    """Similar rates are measured again alternately; if the lead is small, ONNX Runtime is used."""
    rates |= {"openvino": openvino, "cpu": 10.0, "ratio": ratio}
    chosen = make_plan(MODEL, ARTIFACT, RunOptions())
    assert chosen.provider == taken
    assert rates["timed alternately"] == 1
    if 1 < ratio < MARGIN:
        assert f"{ratio:.2f} times as fast as cpu" in chosen.passed_over["openvino"]
    assert make_plan(MODEL, ARTIFACT, RunOptions()) == chosen
    assert rates["timed alternately"] == 1  # from the cache


@pytest.mark.parametrize(("openvino", "taken"), [(30.0, "openvino"), (3.0, "cpu")])
def test_rates_that_are_far_apart_are_measured_once(rates: dict[str, float], openvino: float, taken: str) -> None:
    rates |= {"openvino": openvino, "cpu": 10.0}
    assert make_plan(MODEL, ARTIFACT, RunOptions()).provider == taken
    assert rates["timed alternately"] == 0


def test_two_settings_are_timed_alternately(opened: list[tuple[str, Setting]], monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([2.0, 1.0, 8.0, 2.0, 3.0, 1.0, 1.0, 1.0, 30.0, 1.0])
    monkeypatch.setattr(trial_module, "measure_rate", lambda engine, batch: next(times))
    trial = ProviderTrial(MODEL, ARTIFACT, 1)
    ratio = trial.compare(Candidate("openvino", "fp32", Setting(2)), Candidate("cpu", "fp32", Setting(4)))
    assert ratio == 3.0  # the median of 2, 4, 3, 1 and 30
    assert opened == [("openvino", Setting(2)), ("cpu", Setting(4))]


def test_a_provider_that_fails_in_the_measurement_is_passed_over(
    opened: list[tuple[str, Setting]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ProviderTrial.open

    def refuse(self: ProviderTrial, provider: str, precision: str, setting: Setting) -> Any:
        if provider == "cuda":
            raise ProviderError("the GPU is lost")
        return real(self, provider, precision, setting)

    monkeypatch.setattr(ProviderTrial, "open", refuse)
    monkeypatch.setattr(ProviderTrial, "disagreement", lambda *_: None)
    chosen = make_plan(MODEL, ARTIFACT, RunOptions())
    assert chosen.provider == "tensorrt-rtx"
    assert chosen.passed_over["cuda"] == "the GPU is lost"
    with pytest.raises(ProviderError, match="the GPU is lost"):
        make_plan(MODEL, ARTIFACT, RunOptions(provider="cuda"))


def test_a_plan_names_its_layout() -> None:
    assert Plan("cuda", 8, channels_last=True).describe() == "provider cuda, batch 8, channels last"
