"""Malicious artifacts: each is refused when it is read, or in its first batch."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper
from support.tiny import SMALL_GRIDS, tiny_artifact, tiny_model, write_jpeg

from cloudrt.errors import ArtifactError
from cloudrt.inference.pipeline import Segmenter
from cloudrt.model.artifact import default_model, read_artifact


def saved(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def test_weights_in_another_file_are_refused(tmp_path: Path) -> None:
    model = onnx.load(tiny_artifact(tmp_path / "whole.onnx", labels=SMALL_GRIDS))
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    with pytest.raises(ArtifactError, match="keeps weights in another file"):
        read_artifact(path)


def test_weights_outside_the_folder_are_refused(tmp_path: Path) -> None:
    """The location leads out of the folder of the artifact."""
    model = tiny_model(labels=SMALL_GRIDS)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    with pytest.raises(ArtifactError, match="keeps weights in another file"):
        read_artifact(saved(model, tmp_path / "model.onnx"))


@pytest.mark.parametrize("place", ["attribute", "attributes", "sparse attribute", "sparse", "function"])
def test_weights_in_another_file_are_refused_wherever_they_are(tmp_path: Path, place: str) -> None:
    model = tiny_model(labels=SMALL_GRIDS)
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="weights.bin")
    node = helper.make_node("Constant", [], ["w"])
    if place == "sparse":
        model.graph.sparse_initializer.add(values=tensor, dims=[1])
    elif place == "sparse attribute":
        node.attribute.add(name="sparse_value", type=AttributeProto.SPARSE_TENSOR).sparse_tensor.values.CopyFrom(tensor)
    elif place == "attributes":
        node.attribute.add(name="values", type=AttributeProto.TENSORS).tensors.append(tensor)
    else:
        node.attribute.add(name="value", type=AttributeProto.TENSOR).t.CopyFrom(tensor)
    if place == "function":
        model.functions.add(name="made", domain="ours", output=["w"]).node.append(node)
    else:
        model.graph.node.append(node)
    with pytest.raises(ArtifactError, match="keeps weights in another file"):
        read_artifact(saved(model, tmp_path / "model.onnx"))


def test_a_compiled_engine_is_refused(tmp_path: Path) -> None:
    """The node may name a file that a GPU provider would load."""
    model = tiny_model(labels=SMALL_GRIDS)
    engine: dict[str, Any] = {"embed_mode": 0, "ep_cache_context": "/tmp/engine.bin"}
    model.graph.node.append(helper.make_node("EPContext", ["image"], ["x"], domain="com.microsoft", **engine))
    with pytest.raises(ArtifactError, match="contains a compiled engine"):
        read_artifact(saved(model, tmp_path / "model.onnx"))


@pytest.mark.parametrize("name", ["Loop", "If", "Scan", "SequenceMap", "function"])
def test_every_kind_of_control_flow_is_refused(tmp_path: Path, name: str) -> None:
    model = tiny_model(labels=SMALL_GRIDS)
    body = helper.make_graph([], "body", [], [])
    node = helper.make_node("Loop" if name == "function" else name, ["x"], ["y"])
    node.attribute.append(helper.make_attribute("then_branch" if name == "If" else "body", body))
    if name == "function":
        model.functions.add(name="made", domain="ours", output=["y"]).node.append(node)
    else:
        model.graph.node.append(node)
    with pytest.raises(ArtifactError, match="control flow"):
        read_artifact(saved(model, tmp_path / "model.onnx"))


def test_control_flow_is_refused(tmp_path: Path) -> None:
    """An endless Loop would ignore signals."""
    model = tiny_model(labels=SMALL_GRIDS)
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["again"])],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, [])],
        [value("again", TensorProto.BOOL, [])],
    )
    model.graph.node.append(helper.make_node("Loop", ["", "true"], [], body=body))
    with pytest.raises(ArtifactError, match="control flow"):
        read_artifact(saved(model, tmp_path / "model.onnx"))


@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_an_output_of_another_size_than_declared_is_refused(tmp_path: Path, provider: str) -> None:
    """The graph resizes to half of the grid that its output and its metadata declare."""
    if provider == "openvino":
        pytest.importorskip("openvino")
    model = tiny_model(labels=SMALL_GRIDS)
    (sizes,) = [one for one in model.graph.initializer if one.name == "sizes"]
    half = onnx.numpy_helper.to_array(sizes) // 2
    sizes.CopyFrom(onnx.numpy_helper.from_array(half.astype(np.int64), "sizes"))
    path = saved(model, tmp_path / "model.onnx")
    read_artifact(path)
    image = write_jpeg(tmp_path / "a.jpg", 0).path
    with pytest.raises(ArtifactError), Segmenter(path, provider=provider, batch_size=1) as segmenter:
        list(segmenter.predict([image]))


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, "1" * 6_000, "null", '{"a": NaN}', '"\\ud800"', "-1e999"],
    ids=["deep", "long number", "null", "NaN", "surrogate", "infinite"],
)
@pytest.mark.parametrize("key", ["validation_dice", "rules", "input_size", "classes", "mean"])
def test_absurd_metadata_give_a_one_line_error(tmp_path: Path, key: str, text: str) -> None:
    model = tiny_model(labels=SMALL_GRIDS)
    (entry,) = [one for one in model.metadata_props if one.key == f"cloudrt.{key}"]
    entry.value = text
    with pytest.raises(ArtifactError) as error:
        read_artifact(saved(model, tmp_path / "model.onnx"))
    assert len(str(error.value)) < 1_000 and str(error.value).isprintable()


def test_the_shipped_artifact_is_accepted() -> None:
    assert read_artifact(default_model()).rules


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_are_refused(tmp_path: Path, seed: int) -> None:
    """Most of them lie in weights, where ONNX notices nothing."""
    content = bytearray(default_model().read_bytes())
    generator = np.random.default_rng(seed)
    path = tmp_path / "model.onnx"
    for place in generator.integers(len(content), size=25):
        bit = 1 << int(generator.integers(8))
        content[place] ^= bit
        path.write_bytes(content)
        with pytest.raises(ArtifactError):
            read_artifact(path)
        content[place] ^= bit
    path.write_bytes(content)
    read_artifact(path)


def test_the_checksum_is_that_of_the_file_with_zeros_in_its_place(tmp_path: Path) -> None:
    content = default_model().read_bytes()
    (entry,) = [one for one in onnx.load(default_model()).metadata_props if one.key == "cloudrt.sha256"]
    digest = json.loads(entry.value)
    assert hashlib.sha256(content.replace(digest.encode(), b"0" * 64)).hexdigest() == digest


def test_a_changed_model_is_read_without_its_checksum(tmp_path: Path) -> None:
    model = onnx.load(default_model())
    model.doc_string = "changed on purpose"
    with pytest.raises(ArtifactError, match="was changed after cloudrt wrote it"):
        read_artifact(saved(model, tmp_path / "model.onnx"))
    kept = [one for one in model.metadata_props if one.key != "cloudrt.sha256"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    assert read_artifact(saved(model, tmp_path / "model.onnx")) == read_artifact(default_model())


@pytest.mark.parametrize("value", ["", '""', "0" * 64, '"0"', '"' + "0" * 64 + '"'])
def test_an_invalid_checksum_is_refused(tmp_path: Path, value: str) -> None:
    model = tiny_model(labels=SMALL_GRIDS)
    model.metadata_props.add(key="cloudrt.sha256", value=value)
    with pytest.raises(ArtifactError, match="is damaged"):
        read_artifact(saved(model, tmp_path / "model.onnx"))


def test_files_that_cannot_be_models_are_refused_before_they_are_read(tmp_path: Path) -> None:
    large = tmp_path / "large.onnx"
    with large.open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(ArtifactError, match="has 2,147,483,648 bytes"):
        read_artifact(large)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.onnx")
        with pytest.raises(ArtifactError, match="is not a regular file"):
            read_artifact(tmp_path / "pipe.onnx")
