"""The simplified graph is used only if it passes the gate; a full disk leaves the earlier file."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxslim
import pytest
from click.testing import CliRunner
from cloudrt.export.export import Target, export
from cloudrt.export.graph import simplify, trace
from cloudrt.export.layers import layers_of
from cloudrt.export.source import ExportSource
from onnx import helper
from support.files import file_size_limit

from cloudrt.cli.export import export as command
from cloudrt.errors import DataError


def bypass(model: onnx.ModelProto, operator: str) -> onnx.ModelProto:
    """Return a copy without the first node of a type, whose input replaces its output."""
    shorter = onnx.ModelProto()
    shorter.CopyFrom(model)
    gone = next(node for node in shorter.graph.node if node.op_type == operator)
    before, after = gone.input[0], gone.output[0]
    shorter.graph.node.remove(gone)
    for node in shorter.graph.node:
        for position, name in enumerate(node.input):
            if name == after:
                node.input[position] = before
    return shorter


def with_detour(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy with an Identity after its first node."""
    longer = onnx.ModelProto()
    longer.CopyFrom(model)
    first = longer.graph.node[0]
    value, first.output[0] = first.output[0], "detour"
    longer.graph.node.insert(1, helper.make_node("Identity", ["detour"], [value], name="identity"))
    return longer


def test_a_graph_with_superfluous_nodes_is_simplified(source: ExportSource, tmp_path: Path) -> None:
    longer = copy.copy(source)
    longer.model = with_detour(source.model)
    nodes = len(longer.model.graph.node)
    longer.run_pytorch()
    assert len(longer.model.graph.node) < nodes
    assert set(layers_of(longer.model)) == set(layers_of(source.model))
    done = export(longer, tmp_path / "model.onnx", Target("fp16"))
    assert "Identity" not in {node.op_type for node in onnx.load(done.path).graph.node}
    assert done.artifact.versions["onnxslim"]


def test_a_graph_without_superfluous_nodes_is_unchanged(source: ExportSource) -> None:
    assert simplify(source.model) is source.model


def test_a_simplification_that_changes_the_output_is_dropped(
    source: ExportSource, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(onnxslim, "slim", lambda model: bypass(model, "Relu"))
    wrong = copy.copy(source)
    wrong.run_pytorch()
    assert wrong.model is source.model
    assert "does not pass the gate: using the graph as traced" in caplog.text


def test_a_simplifier_that_fails_is_no_error(
    source: ExportSource, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: object) -> None:
        raise ZeroDivisionError("inside")

    monkeypatch.setattr(onnxslim, "slim", fails)
    assert simplify(source.model) is source.model
    assert "onnxslim failed, using the graph as traced: inside" in caplog.text


def test_a_network_that_cannot_be_exported_gives_a_one_line_error(
    source: ExportSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("shape mismatch\nand a hundred lines more")

    monkeypatch.setattr("torch.onnx.export", fails)
    with pytest.raises(DataError, match=r"FPN with resnet18 cannot be exported at 96x64: shape mismatch$"):
        trace(source.ensemble)


def run_limited(words: list[str], largest: int) -> subprocess.CompletedProcess[str]:
    """Run cloudrt-export with a limit on the size of files, at which writes fail as on a full disk."""
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", "from cloudrt.cli import export; export()", *words]
    with file_size_limit(largest):  # the process inherits it
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of file sizes")
def test_a_full_disk_leaves_the_older_artifact(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    out.write_bytes(b"an older artifact")
    done = run_limited([str(checkpoint), "-o", str(out), "--precision", "fp32", "--overwrite"], 4_000_000)
    assert done.returncode == 2, done.stderr
    remedy = "raise the limit on the size of files (ulimit -f), or write to another disk"
    assert done.stderr.splitlines()[-1] == f"Error: {out}: File too large: {remedy}"
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert out.read_bytes() == b"an older artifact"


def test_no_space_left_gives_a_one_line_error(
    checkpoint: Path, tmp_path: Path, source: ExportSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "model.onnx"))

    monkeypatch.setattr("cloudrt.export.run.ExportSource", lambda *_: source)
    monkeypatch.setattr(Path, "write_bytes", full)
    done = CliRunner().invoke(command, [str(checkpoint), "-o", str(tmp_path / "model.onnx")])
    assert done.exit_code == 2
    assert "model.onnx: No space left on device: free space on this disk" in done.output.splitlines()[-1]
    assert not list(tmp_path.iterdir())
