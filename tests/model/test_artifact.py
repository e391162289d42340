"""The artifact: its metadata round-trips, and files that cloudrt did not write are refused with a remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto
from support.tiny import SMALL_GRIDS, tiny_artifact, tiny_model

import cloudrt.model.artifact
from cloudrt.errors import ArtifactError, DataError
from cloudrt.labels import CLOUDS
from cloudrt.masks.rule import Rule
from cloudrt.model.artifact import Artifact, default_model, parse_artifact, read_artifact, write_metadata

FULL = Artifact(
    labels=SMALL_GRIDS,
    input_size=(64, 96),
    mean=(1.0, 2.5, 3.0),
    std=(4.0, 5.0, 6.0),
    rules=(Rule(1, 2, 3, 4, 5), Rule(6, 7), Rule(8, 9)),
    architecture="FPN",
    encoder="resnet18",
    options={"decoder_pyramid_channels": 64},
    precision="fp16",
    subtract_no_data=True,
    checkpoint_sha256="ab" * 32,
    validation_dice=0.625,
    parity={"dice": 1.0},
    versions={"torch": "2.15.0"},
    weights_license="CC BY 4.0, © the authors",
)


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def set_metadata(model: onnx.ModelProto, values: dict[str, str]) -> None:
    del model.metadata_props[:]
    for key, value in values.items():
        model.metadata_props.add(key=key, value=value)


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    model = tiny_model((64, 96), SMALL_GRIDS, presence=True)
    write_metadata(model, FULL)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert read_artifact(path) == FULL
    assert FULL.output_shape == (3, 90, 60)


def test_metadata_are_json_under_our_prefix_and_others_stay(tmp_path: Path) -> None:
    model = tiny_model()
    model.metadata_props.add(key="author", value="someone")
    write_metadata(model, FULL)
    write_metadata(model, FULL)
    values = metadata(model)
    assert len(values) == len(model.metadata_props)
    assert values.pop("author") == "someone"
    assert all(key.startswith("cloudrt.") for key in values)
    assert json.loads(values["cloudrt.format"]) == 1
    assert json.loads(values["cloudrt.classes"]) == list(SMALL_GRIDS.classes)
    assert json.loads(values["cloudrt.rules"])[0]["gate_pixels"] == 4


def test_the_tiny_artifact_is_sound_and_always_the_same(tmp_path: Path) -> None:
    path = tiny_artifact(tmp_path / "model.onnx")
    artifact = read_artifact(path)
    assert artifact.labels == CLOUDS
    assert artifact.output_shape == (4, 525, 350)
    assert path.read_bytes() == tiny_artifact(tmp_path / "again.onnx").read_bytes()


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no\.onnx is missing.*cloudrt-export"):
        read_artifact(tmp_path / "no.onnx")


def test_without_metadata_cloudrt_export_is_named(tmp_path: Path) -> None:
    model = tiny_model()
    del model.metadata_props[:]
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=r"no cloudrt metadata.*cloudrt-export"):
        read_artifact(tmp_path / "m.onnx")


@pytest.mark.parametrize("content", [b"not a model\n" * 20, b"", b"\xff\xd8\xff\xe0 a picture"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"m\.onnx"):
        read_artifact(path)


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = tiny_artifact(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"m\.onnx"):
        read_artifact(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_artifact(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("format", "2", "format 2"),
        ("format", "{", "Expecting"),
        ("rules", '[{"threshold": 1}]', "not a Rule"),
        ("rules", '[{"threshold": 1, "min_area": 2}]', "1 rules for 3 classes"),
        ("rules", "7", "malformed"),
        ("classes", '["Fish", "Fish"]', "distinct"),
        ("precision", '"fp8"', "fp8"),
        ("input_size", "[64]", "input_size"),
        ("novelty", "1", "novelty"),
    ],
)
def test_metadata_that_do_not_fit_are_named(key: str, value: str, said: str) -> None:
    model = tiny_model((64, 96), SMALL_GRIDS)
    set_metadata(model, metadata(model) | {f"cloudrt.{key}": value})
    with pytest.raises(ArtifactError, match=rf"m\.onnx.*{said}"):
        parse_artifact(model, "m.onnx")


def test_rules_need_the_output_that_they_use() -> None:
    rules = (Rule(100, 50, presence=9), Rule(100, 50), Rule(100, 50))
    parse_artifact(tiny_model((64, 96), SMALL_GRIDS, presence=True, rules=rules), "m.onnx")
    with pytest.raises(ArtifactError, match=r"m\.onnx has no output 'presence'"):
        parse_artifact(tiny_model((64, 96), SMALL_GRIDS, rules=rules), "m.onnx")


def test_metadata_that_lack_a_key_are_named() -> None:
    model = tiny_model((64, 96), SMALL_GRIDS)
    set_metadata(model, {key: value for key, value in metadata(model).items() if key != "cloudrt.rules"})
    with pytest.raises(ArtifactError, match=r"missing.*rules"):
        parse_artifact(model, "m.onnx")


def _float_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT


def _wider_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 128


def _other_grid(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 60


def _other_name(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "mask"


def _no_output(model: onnx.ModelProto) -> None:
    del model.graph.output[:]


@pytest.mark.parametrize("change", [_float_input, _wider_input, _other_grid, _other_name, _no_output])
def test_graphs_that_do_not_fit_their_metadata_are_refused(change: Callable[[onnx.ModelProto], None]) -> None:
    model = tiny_model((64, 96), SMALL_GRIDS)
    change(model)
    with pytest.raises(ArtifactError, match=r"m\.onnx"):
        parse_artifact(model, "m.onnx")


def test_values_out_of_bounds_are_refused() -> None:
    with pytest.raises(DataError, match="fp64"):
        Artifact(precision="fp64")
    with pytest.raises(DataError, match="1 rules for 4 classes"):
        Artifact(rules=(Rule(1, 1),))


def test_the_default_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """./model.onnx first, then the shipped one, else an error that says how to make one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cloudrt.model.artifact, "files", lambda _package: tmp_path / "package")
    with pytest.raises(ArtifactError, match="cloudrt-export"):
        default_model()
    (tmp_path / "package" / "shipped").mkdir(parents=True)
    shipped = tmp_path / "package" / "shipped" / "clouds.onnx"
    shipped.touch()
    assert default_model() == shipped
    Path("model.onnx").touch()
    assert default_model() == Path("model.onnx")
