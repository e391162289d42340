"""The Triton model repository, parsed with Triton's protobuf schema, which its client ships."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cloudrt.export.triton import triton_config, write_repository
from google.protobuf import text_format
from support.networks import make_checkpoint
from support.tiny import SMALL_GRIDS, tiny_artifact

from cloudrt.cli.export import export as command
from cloudrt.engines.tensorrt import triton_options
from cloudrt.errors import DataError
from cloudrt.masks.rule import Rule
from cloudrt.model.artifact import Artifact, read_artifact


def parse(text: str) -> Any:
    """Parse as Triton's server does: an unknown or mistyped field is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    return text_format.Parse(text, model_config.ModelConfig())


@pytest.fixture
def artifact_file(tmp_path: Path) -> Path:
    return tiny_artifact(tmp_path / "model.onnx", (64, 96), SMALL_GRIDS)


def test_repository(artifact_file: Path, tmp_path: Path) -> None:
    artifact = read_artifact(artifact_file)
    root = write_repository(tmp_path / "repository", artifact_file, artifact)
    files = {str(path.relative_to(tmp_path / "repository")) for path in root.rglob("*") if path.is_file()}
    assert files == {"cloudrt/config.pbtxt", "cloudrt/labels.txt", "cloudrt/1/model.onnx"}
    assert (root / "1" / "model.onnx").read_bytes() == artifact_file.read_bytes()
    assert (root / "labels.txt").read_text().split() == ["Fish", "Flower", "Gravel"]
    config = parse((root / "config.pbtxt").read_text())
    assert (config.name, config.backend, config.max_batch_size) == ("cloudrt", "onnxruntime", 32)
    (image,), (probability,) = config.input, config.output
    assert (image.name, image.data_type, list(image.dims)) == ("image", 2, [64, 96, 3])  # TYPE_UINT8 is 2
    assert (probability.name, probability.data_type, list(probability.dims)) == ("probability", 2, [3, 90, 60])
    assert probability.label_filename == "labels.txt"
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 32]
    assert config.dynamic_batching.max_queue_delay_microseconds > 0
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    assert dict(accelerator.parameters) == triton_options(artifact, 32)
    assert [warm.batch_size for warm in config.model_warmup] == [8, 32]
    for warm in config.model_warmup:
        assert list(warm.inputs["image"].dims) == [64, 96, 3]
        assert warm.inputs["image"].random_data
    rules = json.loads(config.parameters["cloudrt.rules"].string_value)
    assert [Rule.from_dict(rules[label]) for label in SMALL_GRIDS.classes] == list(artifact.rules)


def test_the_output_for_presence_is_served(tmp_path: Path) -> None:
    """Triton returns only outputs that its configuration lists, and rules may need presence."""
    model = tiny_artifact(tmp_path / "model.onnx", (64, 96), SMALL_GRIDS, presence=True)
    root = write_repository(tmp_path / "repository", model, read_artifact(model))
    config = parse((root / "config.pbtxt").read_text())
    assert [(one.name, one.data_type, list(one.dims)) for one in config.output] == [
        ("probability", 2, [3, 90, 60]),
        ("presence", 2, [3]),
    ]


def test_quotes_and_odd_labels_are_escaped() -> None:
    labels = replace(SMALL_GRIDS, classes=("two  words", "Wölkchen"))
    config = parse(triton_config(Artifact(labels=labels, input_size=(64, 96)), "clouds", 4))
    assert config.parameters["cloudrt.classes"].string_value == ",".join(labels.classes)


def test_int8_for_cpus_is_not_given_to_tensorrt() -> None:
    int8 = Artifact(labels=SMALL_GRIDS, input_size=(64, 96), precision="int8", int8_target="cpu")
    assert not parse(triton_config(int8, "clouds", 4)).optimization.execution_accelerators.gpu_execution_accelerator
    fitting = parse(triton_config(replace(int8, int8_target="tensorrt"), "clouds", 4))
    (accelerator,) = fitting.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.parameters["precision_mode"] == "FP32"  # the types are the artifact's own


@pytest.mark.parametrize("name", ["", "a/b", "../up", "two words"])
def test_an_invalid_model_name_is_refused(artifact_file: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="letters, digits"):
        write_repository(tmp_path / "repository", artifact_file, read_artifact(artifact_file), name=name)
    assert not (tmp_path / "repository").exists()


def test_batches_of_one() -> None:
    config = parse(triton_config(Artifact(labels=SMALL_GRIDS, input_size=(64, 96)), "clouds", 1))
    assert list(config.dynamic_batching.preferred_batch_size) == [1]


def test_command(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "best.pth")
    words = [str(tmp_path / "best.pth"), "--triton", str(tmp_path / "repository"), "--batch-size", "16"]
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 0, done.output
    assert "a Triton model" in done.output
    root = tmp_path / "repository" / "cloudrt"
    assert (root / "1" / "model.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()
    config = parse((root / "config.pbtxt").read_text())
    assert config.max_batch_size == 16
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.parameters["precision_mode"] == "FP32"
