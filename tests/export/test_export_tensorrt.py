"""Export for TensorRT: the gate builds one engine however long the search is, and `--check tensorrt` on any machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from cloudrt.export.export import Target, export
from cloudrt.export.gate import Gate
from cloudrt.export.layers import layers_of
from cloudrt.export.request import ExportRequest
from cloudrt.export.source import ExportSource
from support.tiny import SMALL_GRIDS, tiny_artifact

from cloudrt.cli.export import export as command
from cloudrt.engines import tensorrt_check
from cloudrt.engines.onnxruntime import OrtEngine
from cloudrt.engines.tensorrt_check import TARGETS, TensorrtCheck
from cloudrt.errors import ArtifactError, ParityError
from cloudrt.model.onnx_file import graph_bytes
from cloudrt.model.parity import Parity, Tolerances

needs_tensorrt = pytest.mark.skipif(not tensorrt_check.is_installed(), reason="TensorRT for RTX is not installed")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, int | None]]:
    """Simulate TensorRT with ONNX Runtime's CPU provider; return (graph, batch size) of each engine built."""
    engines: list[tuple[bytes, int | None]] = []
    real = OrtEngine.__init__

    def open_one(
        self: OrtEngine, model: onnx.ModelProto, artifact: Any, provider: str, size: int | None, *rest: Any
    ) -> None:
        if provider == "tensorrt":
            engines.append((graph_bytes(model), size))
            provider = "cpu"
        real(self, model, artifact, provider, size, *rest)

    monkeypatch.setattr(OrtEngine, "__init__", open_one)
    monkeypatch.setattr("cloudrt.engines.choice.problem", lambda name: None)
    return engines


def test_the_gate_builds_the_engine_that_inference_runs(
    source: ExportSource, tmp_path: Path, built: list[tuple[bytes, int | None]]
) -> None:
    done = export(source, tmp_path / "m.onnx", Target("fp16", provider="tensorrt", batch_size=6))
    assert built == [(graph_bytes(onnx.load(done.path)), 6)]
    assert done.parity.provider == "tensorrt"
    assert done.speed is None  # timing fp32 would build another one


def test_searching_layers_builds_one_engine(
    source: ExportSource, tmp_path: Path, built: list[tuple[bytes, int | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The candidates of the search are measured by emulation; `tests/export/test_keep.py` tests the search."""
    measured: list[bool] = []
    layers = layers_of(source.model)
    monkeypatch.setattr("cloudrt.export.gate.order_by_sensitivity", lambda names, sensitivity: list(names))
    monkeypatch.setattr(
        "cloudrt.export.gate.smallest_kept", lambda names, passes: [passes(names[:n]) for n in range(4)] and names[:3]
    )
    real = Gate.measure

    def measure(self: Gate, model: onnx.ModelProto, *words: Any, give_up: bool = False) -> Parity | None:
        found = real(self, model, *words)
        if self.artifact.precision == "fp32":  # the graph before it is lowered
            return found
        measured.append(self.builds)
        return replace(found, mean_difference=200.0) if found and len(measured) == 1 else found

    monkeypatch.setattr(Gate, "measure", measure)
    done = export(source, tmp_path / "m.onnx", Target("fp16", provider="tensorrt"))
    assert done.artifact.kept_fp32 == tuple(layers[:3])
    assert measured.count(True) == 1 and len(measured) >= 6
    assert built == [(graph_bytes(onnx.load(done.path)), 32)]


def test_an_engine_that_fails_the_gate_is_refused(
    source: ExportSource, tmp_path: Path, built: list[tuple[bytes, int | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's outputs differ, although those of the emulation pass."""
    real = OrtEngine.run

    def wrong(self: OrtEngine, batch: Any) -> Any:
        probability, presence = real(self, batch)
        return (np.minimum(probability, 200) + 55 if self.provider == "tensorrt" else probability), presence

    monkeypatch.setattr(OrtEngine, "run", wrong)
    real_init = OrtEngine.__init__

    def named(self: OrtEngine, model: Any, artifact: Any, provider: str, *rest: Any) -> None:
        real_init(self, model, artifact, provider, *rest)
        self.provider = provider

    monkeypatch.setattr(OrtEngine, "__init__", named)
    with pytest.raises(ParityError, match="would change the submission"):
        export(source, tmp_path / "m.onnx", Target("fp16", provider="tensorrt"))
    assert len(built) == 1 and not (tmp_path / "m.onnx").exists()


@needs_tensorrt
def test_an_artifact_is_checked_alone(tmp_path: Path) -> None:
    """Neither a checkpoint nor torch is needed."""
    path = tiny_artifact(tmp_path / "model.onnx", labels=SMALL_GRIDS)
    done = CliRunner().invoke(command, [str(path), "--check", "tensorrt", "--batch-size", "4"])
    assert done.exit_code == 0, done.output
    assert "accepted by TensorRT for RTX" in done.output
    assert all(target in done.output for target in TARGETS)
    assert list(tmp_path.iterdir()) == [path]


@needs_tensorrt
def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"nothing")
    done = CliRunner().invoke(command, [str(tmp_path / "x.onnx"), "--check", "tensorrt"])
    assert done.exit_code == 2 and "is not an ONNX model" in done.stderr


def test_check_needs_tensorrt_before_anything_slow(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_check, "find_spec", lambda name: None)
    monkeypatch.setattr("cloudrt.export.run.ExportSource", lambda *_: pytest.fail("traces"))
    done = CliRunner().invoke(command, [str(checkpoint), "-o", str(tmp_path / "m.onnx"), "--check", "tensorrt"])
    assert done.exit_code == 2 and "pip install '.[tensorrt-check]'" in done.stderr


@needs_tensorrt
def test_an_export_is_checked_with_tensorrt_for_rtx(source: ExportSource, tmp_path: Path) -> None:
    parsed = export(source, tmp_path / "m.onnx").tensorrt
    assert isinstance(parsed, TensorrtCheck) and parsed.layers > 100 and not parsed.engines
    for_cpus = export(source, tmp_path / "i.onnx", Target("int8", tolerances=Tolerances(255.0, 0.0, 1.0))).tensorrt
    assert isinstance(for_cpus, str) and "--int8-target tensorrt" in for_cpus


@pytest.mark.parametrize("accepted", [True, False])
def test_the_command_shows_the_result_of_the_check(
    source: ExportSource, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accepted: bool
) -> None:
    def check(*words: Any) -> TensorrtCheck:
        if not accepted:
            raise ArtifactError("TensorRT's parser refuses the model: no")
        return TensorrtCheck("1.7", 123)

    monkeypatch.setattr("cloudrt.export.export.check", check)
    monkeypatch.setattr("cloudrt.export.export.is_installed", lambda: True)
    monkeypatch.setattr("cloudrt.export.run.require_tensorrt", lambda: None)
    monkeypatch.setattr("cloudrt.export.run.ExportSource", lambda *_: source)  # already traced
    monkeypatch.setattr(source, "run_pytorch", lambda *_: None)
    figures, words = tmp_path / "figures.json", [str(checkpoint), "-o", str(tmp_path / "m.onnx"), "--precision", "fp32"]
    plain = CliRunner().invoke(command, [*words, "--stats", str(figures)])
    assert plain.exit_code == 0, plain.output
    assert ("accepted by TensorRT for RTX 1.7, 123 layers" if accepted else "refuses the artifact") in plain.output
    stored = json.loads(figures.read_text())["artifacts"][0]["tensorrt"]
    wanted = {"version": "1.7", "layers": 123, "engines": []}
    assert stored == (wanted if accepted else "TensorRT's parser refuses the model: no")
    asked = CliRunner().invoke(command, [*words, "--check", "tensorrt", "--overwrite"])
    assert asked.exit_code == (0 if accepted else 2), asked.output
    assert (tmp_path / "m.onnx").exists()


def test_targets_carry_batch_size_and_check(checkpoint: Path, tmp_path: Path) -> None:
    request = ExportRequest((checkpoint,), output=tmp_path / "m.onnx", batch_size=16, check="tensorrt")
    (target,) = request.targets()
    assert (target.batch_size, target.check) == (16, TARGETS)
