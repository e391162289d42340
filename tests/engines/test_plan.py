"""Plans: what is measured, which measurements count, and which options are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from support.plans import ARTIFACT, MODEL, needs_openvino, plan
from support.tiny import SMALL_GRIDS, tiny_model

import cloudrt.engines.plan
from cloudrt.engines.candidates import NOTHING_FIXED, FixedSettings, Setting
from cloudrt.engines.onnxruntime import OrtEngine
from cloudrt.engines.plan import Plan
from cloudrt.engines.trial import ProviderTrial
from cloudrt.errors import ProviderError
from cloudrt.model.artifact import Artifact, parse_artifact, write_metadata
from cloudrt.options import CudaOptions, OpenvinoOptions, RemoteOptions, RunOptions, TensorrtOptions
from cloudrt.system.nvidia import Driver

OTHER = tiny_model((96, 64), SMALL_GRIDS)


pytestmark = pytest.mark.usefixtures("cache")


@needs_openvino
@pytest.mark.parametrize(("openvino", "cpu", "taken"), [(20.0, 10.0, "openvino"), (10.0, 20.0, "cpu")])
def test_the_fastest_on_a_cpu_is_taken_and_the_other_is_named(
    rates: dict[str, float], openvino: float, cpu: float, taken: str
) -> None:
    rates |= {"openvino": openvino, "cpu": cpu}
    chosen = plan(RunOptions())
    assert (chosen.provider, chosen.images_per_s) == (taken, 20.0)
    other = "cpu" if taken == "openvino" else "openvino"
    assert chosen.passed_over == {
        "tensorrt": "no tensorrt",
        "tensorrt-rtx": "no tensorrt-rtx",
        "cuda": "no cuda",
        other: "10.0 images/s, compared with 20.0",
    }
    measured = rates["comparisons"], rates["measurements"]
    assert plan(RunOptions()) == chosen
    assert (rates["comparisons"], rates["measurements"]) == measured  # from the cache
    plan(RunOptions(), model=OTHER)
    assert rates["measurements"] == measured[1] + 2


def test_a_gpu_is_taken_before_any_cpu(rates: dict[str, float]) -> None:
    rates |= {"cuda": 5.0, "openvino": 20.0, "cpu": 10.0}
    assert plan(RunOptions()).provider == "cuda"
    assert rates["measurements"] == 1


def test_tensorrt_is_taken_where_its_engine_exists(rates: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    rates |= {"tensorrt": 9.0, "cuda": 5.0, "cpu": 1.0}
    chosen = plan(RunOptions())
    assert chosen.provider == "cuda"
    assert "request provider tensorrt" in chosen.passed_over["tensorrt"]
    asked: list[int | None] = []

    def exists(artifact: Artifact, batch_size: int | None, content: bytes, device: int) -> bool:
        asked.append(batch_size)
        return True

    monkeypatch.setattr("cloudrt.engines.session.tensorrt_engine_exists", exists)
    chosen = plan(RunOptions())
    assert (chosen.provider, chosen.batch_size) == ("tensorrt", 32)
    assert asked == [32]  # the batch size of the plan
    assert "5.0 images/s, compared with 9.0" in chosen.passed_over["cuda"]


def test_nothing_is_measured_if_every_option_is_set(rates: dict[str, float], cache: Path) -> None:
    rates |= {"cpu": 1.0}
    assert plan(RunOptions(provider="cpu", batch_size=8)) == Plan("cpu", 8)
    assert plan(RunOptions(provider="auto", batch_size=8)).batch_size == 8
    assert rates["measurements"] == rates["comparisons"] == 0
    assert not cache.exists()


def test_a_provider_that_disagrees_only_runs_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO, changed to return levels that are 9 too high, with the real comparison."""
    openvino = pytest.importorskip("cloudrt.engines.openvino")
    real = openvino.OpenvinoEngine.run

    def too_high(self: Any, batch: NDArray[np.uint8]) -> Any:
        probability, presence = real(self, batch)
        return np.minimum(probability, 246) + 9, presence

    monkeypatch.setattr(openvino.OpenvinoEngine, "run", too_high)
    chosen = plan(RunOptions())
    assert chosen.provider == "cpu"
    assert "differs from ONNX Runtime's CPU provider in fp32: mean difference" in chosen.passed_over["openvino"]
    assert plan(RunOptions(provider="openvino", batch_size=4)).provider == "openvino"


@needs_openvino
def test_local_providers_agree_on_fp32_and_fp16_artifacts() -> None:
    for precision in ("fp32", "fp16"):
        model = tiny_model(labels=SMALL_GRIDS, precision=precision)
        trial = ProviderTrial(model, parse_artifact(model, "m"), 2)
        assert trial.disagreement("openvino", "fp32") is None
        assert trial.disagreement("cpu", "fp32") is None


@needs_openvino
def test_openvino_computes_in_low_precision_if_it_is_native_and_agrees(
    rates: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates |= {"openvino": 2.0, "cpu": 1.0}
    fp16 = replace(ARTIFACT, precision="fp16")
    monkeypatch.setattr("cloudrt.engines.openvino.native_precisions", lambda: ("fp32", "bf16"))
    openvino = RunOptions(provider="openvino")
    assert plan(openvino, fp16).compute_precision == "bf16"
    assert plan(openvino, ARTIFACT).compute_precision == "fp32"  # an fp32 artifact is computed in fp32
    assert plan(openvino.changed(compute_precision="fp32"), fp16).compute_precision == "fp32"
    monkeypatch.setattr(ProviderTrial, "disagreement", lambda self, _, precision: "no" if precision == "bf16" else None)
    assert plan(openvino, fp16, OTHER).compute_precision == "fp32"


@needs_openvino
def test_instructions_that_are_missing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from cloudrt.engines.base import EngineOptions
    from cloudrt.engines.choice import open_engine

    monkeypatch.setattr("cloudrt.engines.openvino.native_precisions", lambda: ("fp32",))
    with pytest.raises(ProviderError, match="no instructions for bf16, only for fp32"):
        open_engine(MODEL, "openvino", 1, 1, EngineOptions(compute_precision="bf16"))
    with pytest.raises(ProviderError, match="no instructions for bf16, only for fp32"):
        plan(RunOptions(provider="openvino", compute_precision="bf16"))
    with pytest.raises(ProviderError, match="`compute_precision='bf16'` needs `provider='openvino'`"):
        plan(RunOptions(compute_precision="bf16"))


def test_devices_are_existing_gpus_of_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = ("H200, 139 GiB", "H200, 139 GiB", "T4, 15 GiB")
    monkeypatch.setattr(cloudrt.engines.plan, "nvidia_driver", lambda: Driver((13, 0), gpus))
    for devices, words in (((0, 3), "there is no GPU 3: this process may use 3"), ((0, 2), "of different models")):
        with pytest.raises(ProviderError, match=words):
            plan(RunOptions(provider="auto", batch_size=4, devices=devices))
    with pytest.raises(ProviderError, match="provider cpu does not run on a GPU"):
        plan(RunOptions(provider="cpu", batch_size=4, devices=(0, 1)))


@pytest.mark.parametrize("gpus", [(), ("H200, 139 GiB",)])
def test_devices_never_fall_back_to_the_cpu(
    rates: dict[str, float], monkeypatch: pytest.MonkeyPatch, gpus: tuple[str, ...]
) -> None:
    rates |= {"cpu": 9.0}
    monkeypatch.setattr(cloudrt.engines.plan, "nvidia_driver", lambda: Driver((13, 0), gpus) if gpus else None)
    assert plan(RunOptions(batch_size=4)).provider == "cpu"
    words = "`devices` asks for GPUs, but .*no cuda" if gpus else "there is no GPU 0"
    for provider in ("auto", "cpu"):
        with pytest.raises(ProviderError, match=words if provider == "auto" else "provider cpu does not run on a GPU"):
            plan(RunOptions(provider=provider, batch_size=4, devices=(0,)))


@needs_openvino
def test_reasons_against_providers_are_logged_once_when_measured(
    rates: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    rates |= {"openvino": 20.0, "cpu": 10.0}
    caplog.set_level("INFO", "cloudrt")
    plan(RunOptions())
    assert [text for text in caplog.messages if " was not chosen: " in text] == [
        *(f"  {name} was not chosen: no {name}" for name in ("tensorrt", "tensorrt-rtx", "cuda")),
        "  cpu was not chosen: 10.0 images/s, compared with 20.0",
    ]
    caplog.clear()
    plan(RunOptions())
    assert not caplog.messages
    caplog.set_level("DEBUG", "cloudrt")
    plan(RunOptions())
    assert "  cuda was not chosen: no cuda" in caplog.messages


def test_a_plan_satisfies_the_options_that_it_was_made_for() -> None:
    one = Plan("openvino", 8, 2, "bf16")
    assert one.describe() == "provider openvino, batch 8, 2 streams, computing in bf16"
    openvino = RunOptions(provider="openvino")
    fixed = openvino.changed(batch_size=8, compute_precision="bf16", openvino=OpenvinoOptions(streams=2))
    assert one.satisfies(RunOptions()) and one.satisfies(fixed)
    assert not one.satisfies(RunOptions(provider="cpu"))
    assert not one.satisfies(RunOptions(batch_size=4))
    assert not one.satisfies(openvino.changed(compute_precision="fp32"))
    assert not one.satisfies(openvino.changed(openvino=OpenvinoOptions(streams=4)))
    cuda = Plan("cuda", 8, 1, "fp32", cuda_graph=True)
    assert cuda.satisfies(RunOptions(cuda=CudaOptions(graph=True))) and cuda.satisfies(RunOptions(provider="cuda"))
    assert not cuda.satisfies(RunOptions(cuda=CudaOptions(graph=False)))
    assert not cuda.satisfies(RunOptions(cuda=CudaOptions(streams=2)))
    assert Plan("cpu", 4).satisfies(RunOptions(provider="cpu", openvino=OpenvinoOptions(streams=4)))
    remote, servers = Plan("remote", 4, 2), RemoteOptions(("http://127.0.0.1:9",), "tiny")
    assert remote.satisfies(RunOptions(remote=servers)) and not remote.satisfies(RunOptions())
    assert not Plan("cpu", 4).satisfies(RunOptions(remote=servers))
    assert not remote.satisfies(RunOptions(remote=replace(servers, streams=3)))


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (RunOptions(provider="openvino", openvino=OpenvinoOptions(streams=3)), FixedSettings(0, 3, False)),
        (RunOptions(provider="cuda", batch_size=8, cuda=CudaOptions(streams=2)), FixedSettings(8, 2, None)),
        (RunOptions(provider="cuda", cuda=CudaOptions(graph=True)), FixedSettings(0, 1, True)),
        (RunOptions(provider="cuda", tensorrt=TensorrtOptions(graph=True)), FixedSettings(0, 0, None)),
        (RunOptions(provider="tensorrt", tensorrt=TensorrtOptions(graph=True)), FixedSettings(32, 1, True)),
    ],
)
def test_settings_of_a_provider_are_fixed_by_its_own_options(
    rates: dict[str, float], monkeypatch: pytest.MonkeyPatch, options: RunOptions, given: FixedSettings
) -> None:
    rates |= {"cpu": 1.0, "openvino": 2.0, "cuda": 3.0, "tensorrt": 4.0}
    asked: list[FixedSettings] = []
    real = ProviderTrial.measure_settings

    def measure_settings(
        self: ProviderTrial, provider: str, precision: str, given: FixedSettings = NOTHING_FIXED
    ) -> list[Setting]:
        asked.append(given)
        return real(self, provider, precision, given)

    monkeypatch.setattr(ProviderTrial, "measure_settings", measure_settings)
    chosen = plan(options)
    assert asked == [given]
    assert chosen.satisfies(options)


def test_int8_is_compared_with_its_own_layers_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[bool] = []
    real = OrtEngine.__init__

    def look(self: OrtEngine, *words: Any) -> None:
        opened.append(words[-1].emulate)
        real(self, *words)

    monkeypatch.setattr(OrtEngine, "__init__", look)
    model = onnx.ModelProto.FromString(MODEL.SerializeToString())
    artifact = replace(ARTIFACT, precision="int8", int8_target="cpu")
    write_metadata(model, artifact)
    assert ProviderTrial(model, artifact, 1).disagreement("cpu", "fp32") is None
    assert opened == [False, True]  # the provider, and its reference


def test_a_run_warns_if_a_gpu_may_be_there_and_is_not_used(
    rates: dict[str, float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Also in containers that lack the driver's library, and not if the user hides the GPUs."""
    rates |= {"cpu": 1.0}

    def warnings() -> list[str]:
        caplog.clear()
        assert plan(RunOptions()).provider == "cpu"
        return [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]

    module = tmp_path / "version"
    monkeypatch.setattr("cloudrt.system.nvidia.nvidia_driver", lambda: None)
    monkeypatch.setattr("cloudrt.system.nvidia.KERNEL_MODULE", module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert not warnings()
    module.touch()
    for _ in range(2):
        assert warnings() == ["No GPU is used: no cuda"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert not warnings()
