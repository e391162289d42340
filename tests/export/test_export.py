"""Export: the artifact matches its metadata and PyTorch, and a wrong one is never written."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from cloudrt.export.export import Target, export
from cloudrt.export.images import open_images
from cloudrt.export.request import ExportRequest, limited
from cloudrt.export.source import ExportSource, SourceOptions
from support.networks import OPTIONS, make_checkpoint

from cloudrt.cli.export import export as command
from cloudrt.data.scenes import draw_scene
from cloudrt.engines.availability import problem
from cloudrt.errors import DataError, ImageError, ParityError
from cloudrt.masks.rule import Rule
from cloudrt.model.artifact import read_artifact
from cloudrt.model.checkpoint import Checkpoint
from cloudrt.model.network import InferenceGraph
from cloudrt.model.parity import TOLERANCES, Tolerances
from cloudrt.system.files import sha256


@pytest.fixture(scope="module")
def artifact(source: ExportSource, checkpoint: Path) -> Path:
    return export(source, checkpoint.with_name("model.onnx")).path


def with_model(source: ExportSource, change: Callable[[onnx.ModelProto], None]) -> ExportSource:
    """Return the same source, with PyTorch's outputs, but a changed graph."""
    wrong = copy.copy(source)
    wrong.model = onnx.ModelProto()
    wrong.model.CopyFrom(source.model)
    change(wrong.model)
    return wrong


def test_the_artifact_meets_the_contract(artifact: Path) -> None:
    model = onnx.load(artifact)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")] == [("", 18)]
    assert model.ir_version <= 10
    assert not any(t.external_data for t in model.graph.initializer)
    (image,), (probability,) = model.graph.input, model.graph.output

    def form(value: onnx.ValueInfoProto) -> tuple[object, ...]:
        dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        return value.name, value.type.tensor_type.elem_type, dims

    assert form(image) == ("image", onnx.TensorProto.UINT8, ["N", 64, 96, 3])
    assert form(probability) == ("probability", onnx.TensorProto.UINT8, ["N", 4, 525, 350])
    (first,) = [node for node in model.graph.node if "image" in node.input and node.op_type != "Shape"]
    assert first.op_type == "Cast"
    assert onnx.helper.get_node_attr_value(first, "to") == onnx.TensorProto.FLOAT
    (last,) = [node for node in model.graph.node if "probability" in node.output]
    assert (last.op_type, onnx.helper.get_node_attr_value(last, "to")) == ("Cast", onnx.TensorProto.UINT8)


def test_fp16_has_weights_in_fp16_and_the_sigmoid_in_float32(artifact: Path) -> None:
    model = onnx.load(artifact)
    halves = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
    assert sum(int(np.prod(t.dims)) for t in halves) > 10_000_000
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}
    inputs = {node.op_type: types.get(node.input[0]) for node in model.graph.node}
    assert inputs["Sigmoid"] == inputs["Round"] == onnx.TensorProto.FLOAT


def test_metadata(artifact: Path, checkpoint: Path) -> None:
    said = read_artifact(artifact)
    assert said.precision == "fp16"
    assert said.rules == (Rule(127, 500),) * 4
    assert said.input_size == (64, 96)
    assert said.encoder == "resnet18"
    assert said.options == OPTIONS
    assert said.validation_dice == 0.5
    assert said.checkpoint_sha256 == sha256(checkpoint)
    assert said.parity["images"] == 16
    assert said.parity["dice"] >= 0.995
    assert {"torch", "onnx", "cloudrt"} <= set(said.versions)
    text = artifact.read_bytes()
    assert str(Path(__file__).parent).encode() not in text  # no folder of this machine
    assert b"site-packages" not in text


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_equals_torch_at_any_batch(source: ExportSource, checkpoint: Path, tmp_path: Path, precision: str) -> None:
    loaded = Checkpoint.load(checkpoint)
    graph = InferenceGraph(loaded.network(), loaded.config).eval()
    path = export(source, tmp_path / "m.onnx", Target(precision)).path
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images = np.stack([draw_scene(seed, (64, 96)).image for seed in range(5)])
    for batch in (1, 3, 5):
        with torch.inference_mode():
            wanted = graph(torch.from_numpy(images[:batch])).numpy()
        (found,) = session.run(None, {"image": images[:batch]})
        difference = np.abs(found.astype(int) - wanted)
        assert difference.max() <= (1 if precision == "fp32" else 3)


def swap_channels(model: onnx.ModelProto) -> None:
    (stem,) = [t for t in model.graph.initializer if list(t.dims[1:]) == [3, 7, 7]]
    values = onnx.numpy_helper.to_array(stem)[:, ::-1]
    stem.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), stem.name))


def set_constant(model: onnx.ModelProto, name: str, value: float) -> None:
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    values = np.full(tuple(tensor.dims), value, np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))


def scale_weights(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 4 and tensor.name.endswith("weight"):
            values = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array((values * 1.2).astype(values.dtype), tensor.name))


def shift_pixel_centres(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "coordinate_transformation_mode":
                attribute.s = b"asymmetric"


MISTAKES: dict[str, Callable[[onnx.ModelProto], None]] = {
    "swapped channels": swap_channels,
    "wrong mean": lambda model: set_constant(model, "members.0.mean", 0),
    "wrong std": lambda model: set_constant(model, "members.0.std", 1),
    "scaled weights": scale_weights,
    "other pixel centres": shift_pixel_centres,
}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused(source: ExportSource, tmp_path: Path, mistake: str, precision: str) -> None:
    wrong = with_model(source, MISTAKES[mistake])
    (tmp_path / "old.onnx").write_bytes(b"an older artifact")
    with pytest.raises(ParityError, match=r"fp32 would change the submission.*Nothing was written; try") as caught:
        export(wrong, tmp_path / "old.onnx", Target(precision))
    assert re.fullmatch(r"fp32 compared with PyTorch fp32 on \d+ .*, in cpu", caught.value.title)
    assert [path.name for path in tmp_path.iterdir()] == ["old.onnx"]
    assert (tmp_path / "old.onnx").read_bytes() == b"an older artifact"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> ExportSource:
    """The source of a checkpoint without rules."""
    path = tmp_path_factory.mktemp("raw") / "raw.pth"
    make_checkpoint(path, rules=False)
    return ExportSource(path)


def test_without_rules_only_the_probabilities_are_compared(raw: ExportSource, tmp_path: Path) -> None:
    done = export(raw, tmp_path / "raw.onnx", Target("fp32"))
    assert done.artifact.rules == ()
    assert not done.parity.has_rules
    judged = {verdict.figure: verdict.passed for verdict in done.parity.verdicts(Tolerances(0.1, 1.1, -1.0))}
    assert judged["mean difference, levels of 1/255"] is True
    assert judged["Dice between the submissions"] is None
    assert judged["rows empty in one submission only"] is None


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_without_rules(raw: ExportSource, tmp_path: Path, mistake: str) -> None:
    wrong = with_model(raw, MISTAKES[mistake])
    with pytest.raises(ParityError, match="mean difference"):
        export(wrong, tmp_path / "raw.onnx", Target("fp32"))
    assert not list(tmp_path.iterdir())


def test_calibration_folder(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    with pytest.raises(DataError, match="holds no images"):
        ExportSource(checkpoint, SourceOptions(data=folder))
    (folder / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError, match="none of 1"):
        ExportSource(checkpoint, SourceOptions(data=folder))


def test_calibration_and_comparison_share_no_image(tmp_path: Path) -> None:
    for i in range(9):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((32, 32, 3), 20 * i, np.uint8))
    compared, calibration = open_images(tmp_path, (32, 32), 3, calibrate=True)
    assert (len(compared.names), len(calibration.names)) == (3, 3)
    assert not set(compared.names) & set(calibration.names)
    for images in (compared, calibration):
        assert [int(name[0]) * 20 for name in images.names] == [int(image[0, 0, 0]) for image in images.images]
    assert open_images(tmp_path, (32, 32), 64)[0].names == tuple(f"{i}.png" for i in range(9))
    scenes = open_images(None, (32, 32), 64, calibrate=True)
    assert not (scenes[0].images[:, None] == scenes[1].images[None]).all((2, 3, 4)).any()


def test_command(checkpoint: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    out = tmp_path / "out.onnx"
    done = runner.invoke(command, [str(checkpoint), "-o", str(out), "--precision", "fp32"])
    assert done.exit_code == 0, done.output
    assert "Dice between the submissions" in done.output
    assert read_artifact(out).precision == "fp32"
    refused = runner.invoke(command, [str(checkpoint), "-o", str(tmp_path / "no.onnx"), "--max-mean-difference", "0"])
    assert refused.exit_code == 2
    assert "FAILED" in refused.output and "fp16 rounding emulated" in " ".join(refused.output.split())
    assert "Nothing was written; try" in refused.output
    assert not (tmp_path / "no.onnx").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none.pth"], "is missing"),
        (["model.onnx"], "is an artifact already"),
        (["BEST", "--input-size", "100x64"], "multiples of 32, such as 96x64 or 128x64"),
        (["BEST", "--input-size", "huge"], "WIDTHxHEIGHT"),
        (["BEST", "--precision", "int4"], "int4"),
        (["BEST", "--precision", "all", "--triton", "repository"], "give one --precision"),
        (["BEST", "--precision", "int8", "--provider", "cuda"], "would compute in float"),
        (["BEST", "--build-engine"], "pip install '.[cuda,tensorrt]'"),
        (["BEST", "--provider", "tensorrt"], "provider tensorrt cannot run here"),
        (["BEST", "--input-size", "320000x320000"], "more than 16 megapixels"),
        (["BEST", "--input-size", "0x0"], "such as 32x32\n"),
        (["BEST", "--max-mean-difference", "nan"], "nan is not a limit"),
        (["BEST", "BEST"], "the same checkpoint twice"),
        (["BEST", "-o", "BEST"], "best.pth would be replaced"),
        (["BEST", "--stats", "BEST"], "best.pth would be replaced"),
        (["BEST", "-o", "m.onnx", "--stats", "m.onnx"], "m.onnx would be replaced"),
        (["BEST", "--precision", "all", "--stats", "m.int8.onnx", "-o", "m.onnx"], "m.int8.onnx would be replaced"),
        (["BEST", "-o", "/dev/null"], "is not a regular file"),
        (["BEST", "-o", "BEST/m.onnx"], "is not a folder"),
        (["BEST", "--triton", "BEST"], "best.pth is not a folder"),
    ],
)
def test_wrong_arguments_are_one_line_before_anything_slow(
    checkpoint: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    said: str,
) -> None:
    own = tmp_path_factory.mktemp("own") / "best.pth"  # no model.onnx of another test lies beside it
    shutil.copyfile(checkpoint, own)

    def slow(*_: object) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr("cloudrt.export.source.trace", slow)
    monkeypatch.setattr("cloudrt.engines.availability.nvidia_driver", lambda: None)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(command, [word.replace("BEST", str(own)) for word in words])
    assert done.exit_code == 2, done.output
    assert said in done.output.splitlines(keepends=True)[-1]
    assert not list(tmp_path.iterdir())
    assert own.read_bytes() == checkpoint.read_bytes()
    assert list(own.parent.iterdir()) == [own]


def test_the_function_does_not_replace_the_checkpoint(source: ExportSource, checkpoint: Path) -> None:
    with pytest.raises(DataError, match="is the checkpoint itself"):
        export(source, checkpoint)
    assert Checkpoint.load(checkpoint).epoch == 1


def test_a_warning_for_images_that_cannot_show_differences(
    tmp_path: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = Checkpoint.load(checkpoint)
    replace(made, rules=(Rule(255, 0),) * 4).save(tmp_path / "blind.pth")
    cv2.imwrite(str(tmp_path / "one.png"), np.zeros((64, 96, 3), np.uint8))
    ExportSource(tmp_path / "blind.pth", SourceOptions(data=tmp_path)).run_pytorch()
    assert "PyTorch predicts no mask on any of these images" in caplog.text
    assert "images compared: only 1; one row is 25.0% of the total" in caplog.text


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(DataError, match="precision must be one of fp32, fp16, int8 and all, found 'fp8'"):
        ExportRequest((Path("best.pth"),), precision="fp8")


def test_limits_never_loosen_higher_precisions() -> None:
    wide = {"mean_difference": 5.0, "dice": 0.9, "empty_mismatch": 0.1}
    assert limited(TOLERANCES["fp16"], wide, tighten=True) == TOLERANCES["fp16"]
    assert limited(TOLERANCES["int8"], wide) == Tolerances(5.0, 0.9, 0.1)
    strict = {"mean_difference": 0.01, "dice": 0.9999}
    assert limited(TOLERANCES["fp32"], strict, tighten=True) == Tolerances(0.01, 0.9999)


def test_the_help_shows_the_limits_of_each_precision() -> None:
    shown = {option.name: getattr(option, "help", "") for option in command.params}
    for precision in ("fp32", "fp16", "int8"):
        limits = TOLERANCES[precision]
        assert f"{limits.mean_difference:g} {precision}" in shown["max_mean_difference"]
        assert f"{limits.dice:g} {precision}" in shown["min_dice"]
        assert f"Default: {limits.empty_mismatch:g}" in shown["max_empty_mismatch"]


def test_another_input_size_than_the_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    done = export(ExportSource(checkpoint, SourceOptions(input_size=(96, 64))), tmp_path / "m.onnx", Target("fp32"))
    assert done.artifact.input_size == read_artifact(tmp_path / "m.onnx").input_size == (96, 64)


@pytest.mark.cuda
@pytest.mark.skipif(problem("cuda") is not None, reason="needs an NVIDIA GPU with CUDA")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_gate_runs_in_cuda(source: ExportSource, tmp_path: Path, precision: str) -> None:
    """Opening the engine also fails where a Conv, Resize or normalisation node is not on the GPU."""
    done = export(source, tmp_path / "m.onnx", Target(precision, provider="cuda"))
    assert done.parity.provider == "cuda"
    assert (done.speed is None) == (precision == "fp32")
