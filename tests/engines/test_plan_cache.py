"""Measurements of plans are cached by all that they depend on, and measured again where the cache is invalid."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.plans import ARTIFACT, MODEL, needs_openvino, plan
from support.tiny import SMALL_GRIDS, tiny_artifact

from cloudrt.engines import tensorrt_rtx
from cloudrt.engines.candidates import Setting
from cloudrt.engines.measurements import MeasurementCache
from cloudrt.engines.plan import Plan, make_plan
from cloudrt.engines.trial import ProviderTrial
from cloudrt.errors import ArtifactError, CloudrtError, MemoryExhausted, ProviderError
from cloudrt.inference.pipeline import Segmenter
from cloudrt.options import RunOptions
from cloudrt.system.machine import describe_machine
from cloudrt.system.nvidia import Driver
from cloudrt.system.versions import package_version

pytestmark = pytest.mark.usefixtures("cache")


def test_measurements_are_cached_by_all_that_they_depend_on(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    MeasurementCache("ab", 2, False).put("rate", [1, 2])
    assert MeasurementCache("ab", 2, False).get("rate") == [1, 2]
    assert "rate" not in MeasurementCache("cd", 2, False)
    assert "rate" not in MeasurementCache("ab", 3, False)
    assert "rate" not in MeasurementCache("ab", 2, True)
    for package in ("cloudrt", "openvino", "tensorrt", *tensorrt_rtx.PACKAGES):
        monkeypatch.setattr(
            "cloudrt.engines.measurements.package_version",
            lambda name, changed=package: "99" if name == changed else package_version(name),
        )
        assert "rate" not in MeasurementCache("ab", 2, False), package
    monkeypatch.setattr("cloudrt.engines.measurements.nvidia_driver", lambda: Driver((13, 0), ()))
    assert "rate" not in MeasurementCache("ab", 2, False)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    (file,) = (cache / "cloudrt" / "plans").iterdir()
    for damaged in ("", "[1]", "{", '{"rate": ', "[" * 200_000):
        file.write_text(damaged)
        assert "rate" not in MeasurementCache("ab", 2, False)
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("in the way")
    caplog.set_level("WARNING", "cloudrt")
    known = MeasurementCache("ab", 2, False)
    known.put("rate", 3)
    assert known.get("rate") == 3
    assert "cannot store the tuning" in caplog.text


def test_gpus_of_different_models_are_measured_separately(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = replace(describe_machine(), gpus=("A, 80 GiB", "B, 16 GiB", "A, 80 GiB"))
    monkeypatch.setattr("cloudrt.system.machine.describe_machine", lambda: machine)
    MeasurementCache("ab", 2, False, device=0).put("rate", 1)
    assert "rate" not in MeasurementCache("ab", 2, False, device=1)
    assert MeasurementCache("ab", 2, False, device=2).get("rate") == 1


def test_a_plan_uses_the_measurements_of_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []

    class Recording(MeasurementCache):
        def __init__(self, sha256: str, threads: int, allow_cpu: bool, device: int = 0) -> None:
            devices.append(device)
            super().__init__(sha256, threads, allow_cpu, device)

    monkeypatch.setattr("cloudrt.engines.plan.MeasurementCache", Recording)
    monkeypatch.setattr("cloudrt.engines.plan.nvidia_driver", lambda: Driver((13, 0), ("A, 80 GiB", "B, 16 GiB")))
    monkeypatch.setattr("cloudrt.engines.plan.artifact_problem", lambda *_: "not installed")
    with pytest.raises(ProviderError, match="no GPU provider here"):
        make_plan(MODEL, ARTIFACT, RunOptions(devices=(1,)))
    assert devices == [1]


def test_a_segmenter_measures_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_artifact(tmp_path / "model.onnx", labels=SMALL_GRIDS)
    with Segmenter(model, threads=1) as first:
        plan = first.plan
        assert plan.images_per_s > 0

    def never(*_: object) -> Iterator[Setting]:
        raise AssertionError("measured again")

    monkeypatch.setattr(ProviderTrial, "measure_settings", never)
    monkeypatch.setattr(ProviderTrial, "disagreement", never)
    with Segmenter(model, threads=1) as second:
        assert second.plan == plan
        assert (second.batch_size, second.identity().streams) == (plan.batch_size, plan.streams)


@needs_openvino
@pytest.mark.parametrize("where", ["measure_settings", "disagreement"])
@pytest.mark.parametrize(
    "error",
    [
        MemoryExhausted("not enough memory for openvino"),
        ProviderError("the driver is too old"),
        ArtifactError("no Conv"),
    ],
    ids=["memory", "provider", "artifact"],
)
def test_only_the_refusal_of_a_graph_is_cached(
    rates: dict[str, float], monkeypatch: pytest.MonkeyPatch, where: str, error: CloudrtError
) -> None:
    """After any error, the other provider is used; what may have been repaired since is tried again by the next run."""
    rates |= {"openvino": 20.0, "cpu": 10.0}
    real = getattr(ProviderTrial, where)

    def lacking(self: ProviderTrial, provider: str, *words: Any) -> Any:
        if provider != "openvino":
            return real(self, provider, *words)
        if where == "disagreement":
            raise error
        self.refusal = error
        return []

    with monkeypatch.context() as patch:
        patch.setattr(ProviderTrial, where, lacking)
        chosen = plan(RunOptions())
        assert chosen.provider == "cpu"
        assert str(error) in chosen.passed_over["openvino"]
    stored = where == "disagreement" and isinstance(error, ArtifactError)
    assert plan(RunOptions()).provider == ("cpu" if stored else "openvino")


@pytest.mark.parametrize(
    "kept",
    [
        5,
        None,
        "x",
        [{"size": 1}],
        [5],
        [],
        [{"batch_size": 4, "images_per_s": "7"}],
        [{"batch_size": 0, "images_per_s": 7.0}],
        [{"batch_size": 4, "streams": 0, "images_per_s": 7.0}],
        [{"batch_size": 4, "images_per_s": float("nan")}],
        [{"batch_size": True, "images_per_s": 7.0}],
    ],
)
def test_invalid_cached_measurements_are_measured_again(rates: dict[str, float], cache: Path, kept: object) -> None:
    rates |= {"cpu": 10.0}
    first = plan(RunOptions())
    (file,) = (cache / "cloudrt" / "plans").iterdir()
    values = json.loads(file.read_text())
    file.write_text(json.dumps(dict.fromkeys(values, kept)))
    measurements = rates["measurements"]
    assert plan(RunOptions()) == first
    assert rates["measurements"] == measurements + 1


def test_a_plan_of_an_earlier_run_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    settled = Plan("cpu", 4)
    assert make_plan(MODEL, ARTIFACT, RunOptions(), settled) == settled
    with pytest.raises(ProviderError, match="provider cpu does not run on a GPU"):
        make_plan(MODEL, ARTIFACT, RunOptions(devices=(0, 1)), settled)
    monkeypatch.setattr("cloudrt.engines.choice.problem", lambda name: "it was uninstalled")
    with pytest.raises(ProviderError, match="it was uninstalled"):
        make_plan(MODEL, ARTIFACT, RunOptions(), settled)
