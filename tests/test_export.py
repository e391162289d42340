"""Export: the artifact is what DESIGN says, equals PyTorch, and a wrong one is never written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from cloudrt.export.ensemble import Ensemble
from cloudrt.export.export import export
from cloudrt.export.graph import to_onnx
from cloudrt.export.parity import Parity, Tolerances

from cloudrt.artifact import read_artifact
from cloudrt.cli.export import export as command
from cloudrt.errors import ArtifactError, DataError, ImageError, ParityError
from cloudrt.labels import Labels
from cloudrt.network import Checkpoint, InferenceGraph, NetworkConfig, build_network
from cloudrt.postprocess import Rule
from cloudrt.scenes import draw_scene

OPTIONS = {"decoder_pyramid_channels": 16, "decoder_segmentation_channels": 32}


def make_checkpoint(
    path: Path, encoder: str = "resnet18", rules: bool = True, seed: int = 0, **config_values: Any
) -> Checkpoint:
    torch.manual_seed(seed)
    config = NetworkConfig("FPN", encoder, OPTIONS, **{"input_size": (64, 96), **config_values})
    network = build_network(config)
    checkpoint = Checkpoint(config, network.state_dict(), (Rule(127, 500),) * 4 if rules else (), 0.5, 1)
    checkpoint.save(path)
    return checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "best.pth"
    make_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def artifact(checkpoint: Path) -> Path:
    return export(checkpoint, checkpoint.with_name("model.onnx")).path


def test_artifact_is_the_contract(artifact: Path) -> None:
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


def test_fp16_holds_halves_inside_and_floats_at_the_edges(artifact: Path) -> None:
    graph = onnx.load(artifact).graph
    halves = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
    assert sum(int(np.prod(t.dims)) for t in halves) > 10_000_000
    inferred = onnx.shape_inference.infer_shapes(onnx.load(artifact)).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}
    for node in graph.node:
        if node.op_type in ("Sigmoid", "Round"):
            assert kinds[node.input[0]] == onnx.TensorProto.FLOAT


def test_metadata(artifact: Path, checkpoint: Path) -> None:
    import hashlib

    said = read_artifact(artifact)
    assert said.precision == "fp16"
    assert said.rules == (Rule(127, 500),) * 4
    assert said.input_size == (64, 96)
    assert said.encoder == "resnet18"
    assert said.options == OPTIONS
    assert said.validation_dice == 0.5
    assert said.checkpoint_sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert said.parity["images"] == 16
    assert said.parity["dice"] >= 0.995
    assert {"torch", "onnx", "cloudrt"} <= set(said.versions)
    text = artifact.read_bytes()
    assert str(Path(__file__).parent).encode() not in text  # no folder of this machine
    assert b"site-packages" not in text


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_equals_torch_at_any_batch(checkpoint: Path, precision: str) -> None:
    loaded = Checkpoint.load(checkpoint)
    graph = InferenceGraph(loaded.network(), loaded.config).eval()
    session = onnxruntime.InferenceSession(
        to_onnx(Ensemble((loaded,)), precision).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    images = np.stack([draw_scene(seed, (64, 96)).image for seed in range(5)])
    for batch in (1, 3, 5):
        with torch.inference_mode():
            wanted = graph(torch.from_numpy(images[:batch])).numpy()
        (found,) = session.run(None, {"image": images[:batch]})
        difference = np.abs(found.astype(int) - wanted)
        assert difference.max() <= (1 if precision == "fp32" else 3)


def test_network_without_rules_exports(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "raw.pth", rules=False)
    assert export(tmp_path / "raw.pth", tmp_path / "raw.onnx", "fp32").artifact.rules == ()


@pytest.mark.parametrize("mistake", ["swapped channels", "wrong mean", "tampered weights", "other corners"])
def test_mistakes_are_refused(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    from cloudrt.export import export as stage

    def wrong(ensemble: Ensemble, precision: str) -> onnx.ModelProto:
        (loaded,) = ensemble.checkpoints
        if mistake == "wrong mean":
            loaded = replace(loaded, config=replace(loaded.config, mean=(0.0, 0.0, 0.0)))
        if mistake == "tampered weights":
            loaded = replace(loaded, weights={k: v * 1.2 if v.ndim == 4 else v for k, v in loaded.weights.items()})
        model = to_onnx(replace(ensemble, checkpoints=(loaded,)), precision)
        if mistake == "swapped channels":
            (stem,) = [t for t in model.graph.initializer if t.dims[1:] == [3, 7, 7]]
            values = onnx.numpy_helper.to_array(stem)[:, ::-1]
            stem.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), stem.name))
        if mistake == "other corners":
            for node in model.graph.node:
                for attribute in node.attribute:
                    if attribute.name == "coordinate_transformation_mode":
                        attribute.s = b"asymmetric"
        return model

    monkeypatch.setattr("cloudrt.export.export.to_onnx", wrong)
    assert stage
    with pytest.raises(ParityError, match="would change the submission"):
        export(checkpoint, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_faults_name_each_figure() -> None:
    bad = Parity(4, "scenes", 255, float("nan"), 0.5, 0.2, 0.4, ("a.jpg",))
    faults = bad.faults(Tolerances(0.5, 0.995))
    assert len(faults) == 3  # nan is past every tolerance
    assert Parity(4, "scenes", 1, 0.1, 0.0, 1.0, 0.0, ()).faults(Tolerances(0.5, 0.995)) == []


def test_calibration_folder(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    with pytest.raises(Exception, match="holds no images"):
        export(checkpoint, tmp_path / "model.onnx", calibration=folder)
    (folder / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError, match="none of 1"):
        export(checkpoint, tmp_path / "model.onnx", calibration=folder)
    assert not (tmp_path / "model.onnx").exists()


def test_command(checkpoint: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    out = tmp_path / "out.onnx"
    done = runner.invoke(command, [str(checkpoint), "-o", str(out), "--precision", "fp32"])
    assert done.exit_code == 0, done.output
    assert "Dice between the submissions" in done.output
    assert read_artifact(out).precision == "fp32"
    refused = runner.invoke(command, [str(checkpoint), "-o", str(tmp_path / "no.onnx"), "--max-mean-difference", "0"])
    assert refused.exit_code == 2
    assert "Nothing was written" in refused.output
    assert not (tmp_path / "no.onnx").exists()
    missing = runner.invoke(command, [str(tmp_path / "none.pth")])
    assert missing.exit_code == 2
    assert "is missing" in missing.output


def test_an_onnx_file_of_others_is_refused(tmp_path: Path, artifact: Path) -> None:
    model = onnx.load(artifact)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "plain.onnx")
    with pytest.raises(ArtifactError, match="cloudrt-export"):
        read_artifact(tmp_path / "plain.onnx")


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another encoder, trained on other statistics."""
    path = tmp_path_factory.mktemp("second") / "best.pth"
    make_checkpoint(path, "tu-regnety_002", seed=1, mean=(100.0, 110.0, 90.0), subtract_no_data=False)
    return path


def probability(path: Path, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What a checkpoint's network says of (N, H, W, 3) images, not yet rounded, step by step: (N, C, H_out, W_out)."""
    loaded = Checkpoint.load(path)
    graph = InferenceGraph(loaded.network(), loaded.config).eval()
    with torch.inference_mode():
        return graph.probability(torch.from_numpy(image).float().permute(0, 3, 1, 2)).numpy()


FLIPS: dict[str, list[tuple[bool, bool]]] = {
    "none": [(False, False)],
    "h": [(False, False), (False, True)],
    "v": [(False, False), (True, False)],
    "hv": [(False, False), (False, True), (True, False), (True, True)],
}


@pytest.mark.parametrize(("members", "tta"), [(1, "h"), (1, "v"), (1, "hv"), (2, "none"), (2, "hv")])
def test_flips_and_members_are_averaged_in_the_graph(
    checkpoint: Path, second: Path, tmp_path: Path, tta: str, members: int
) -> None:
    paths = [checkpoint, second][:members]
    done = export(paths, tmp_path / "m.onnx", "fp32", tta=tta)
    images = np.stack([draw_scene(seed, (64, 96)).image for seed in range(3)])
    views = []
    for path in paths:
        for up_down, left_right in FLIPS[tta]:
            flipped = images[:, :: -1 if up_down else 1, :: -1 if left_right else 1].copy()
            views.append(probability(path, flipped)[:, :, :: -1 if up_down else 1, :: -1 if left_right else 1])
    wanted = np.rint(np.mean(views, axis=0) * 255).transpose(0, 1, 3, 2)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"image": images})
    assert np.abs(found - wanted).max() <= 1
    assert done.networks_per_image == len(views)
    said = read_artifact(tmp_path / "m.onnx")
    assert said.tta == tta
    assert [member["encoder"] for member in said.members] == (["resnet18", "tu-regnety_002"] if members == 2 else [])


def test_a_flip_that_is_not_flipped_back_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(ensemble: Ensemble, precision: str) -> onnx.ModelProto:
        return to_onnx(replace(ensemble, tta="none"), precision)

    monkeypatch.setattr("cloudrt.export.export.to_onnx", wrong)
    with pytest.raises(ParityError, match="would change the submission"):
        export(checkpoint, tmp_path / "m.onnx", "fp32", tta="hv")
    assert not list(tmp_path.iterdir())


def test_members_must_go_together(checkpoint: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "large.pth", input_size=(96, 96))
    with pytest.raises(DataError, match="one input size"):
        export([checkpoint, tmp_path / "large.pth"], tmp_path / "m.onnx")
    make_checkpoint(tmp_path / "other.pth", labels=Labels(("A", "B")))
    with pytest.raises(DataError, match="one labels"):
        export([checkpoint, tmp_path / "other.pth"], tmp_path / "m.onnx")
    with pytest.raises(DataError, match="tta is one of"):
        export(checkpoint, tmp_path / "m.onnx", tta="diagonal")


def test_command_of_an_ensemble(checkpoint: Path, second: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    words = [str(checkpoint), str(second), "-o", str(out), "--precision", "fp32", "--tta", "flip"]
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 0, done.output
    assert "8 networks run for each image" in done.output
    assert read_artifact(out).tta == "hv"
