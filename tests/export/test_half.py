"""Lowering to fp16: equal to PyTorch in half precision; overflow is seen on a CPU; what overflows stays in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cloudrt.export.export import Target, export
from cloudrt.export.half import _lower_attributes, emulate_half, to_half
from cloudrt.export.layers import SCOPES, layers_of, strip_metadata_props
from cloudrt.export.source import ExportSource
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from support.networks import make_checkpoint

from cloudrt.data.scenes import draw_scene
from cloudrt.engines.choice import open_engine
from cloudrt.model.artifact import read_artifact
from cloudrt.model.checkpoint import Checkpoint
from cloudrt.model.network import InferenceGraph

OVERFLOWING = "decoder.seg_blocks.0.block.0.block.0"
"""A convolution whose outputs are normalised right after it: scaling its weights changes nothing but its range."""
NORMALISING = "decoder.seg_blocks.0.block.0.block.1"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a convolution whose sums reach about 1e6, beyond fp16's 65504, though no weight does."""
    path = tmp_path_factory.mktemp("half") / "best.pth"
    made = make_checkpoint(path)
    made.weights[f"{OVERFLOWING}.weight"] *= 2e5
    made.save(path)
    return path


@pytest.fixture(scope="module")
def source(checkpoint: Path) -> ExportSource:
    return ExportSource(checkpoint)


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return np.stack([draw_scene(seed, (64, 96)).image for seed in range(4)])


def run(model: onnx.ModelProto, images: NDArray[np.uint8]) -> NDArray[np.int64]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"image": images})
    return np.asarray(found, np.int64)


def test_layers_have_the_names_of_pytorchs_modules(source: ExportSource, checkpoint: Path) -> None:
    layers = layers_of(source.model)
    modules = dict(Checkpoint.load(checkpoint).network().named_modules())
    assert len(layers) > 60
    assert set(layers) <= set(modules)
    assert {OVERFLOWING, NORMALISING, "segmentation_head.0"} <= set(layers)
    convolutions = {name for name, module in modules.items() if isinstance(module, torch.nn.Conv2d)}
    # A BatchNorm that follows a convolution is folded into it, under either name.
    assert len(convolutions & set(layers)) >= 10


def test_overflow_that_the_cpu_hides_is_seen_when_emulated(source: ExportSource, images: NDArray[np.uint8]) -> None:
    exact = run(source.model, images)
    half = to_half(source.model)
    strip_metadata_props(half)
    hidden, seen = np.abs(run(half, images) - exact), np.abs(run(emulate_half(half), images) - exact)
    assert hidden.max() <= 3  # the CPU provider computes whole chains in float32, so the overflow does not occur here
    assert seen.mean() > 5


def test_constants_beyond_the_range_become_infinite() -> None:
    value = numpy_helper.from_array(np.array([1, 1e6], np.float32), "value")
    node = helper.make_node("Constant", [], ["c"], value=value)
    _lower_attributes(node)
    assert numpy_helper.to_array(node.attribute[0].t).tolist() == [1, np.inf]


def test_the_layers_that_overflow_are_found_kept_and_stored(source: ExportSource, tmp_path: Path) -> None:
    done = export(source, tmp_path / "model.onnx", Target("fp16"))
    assert set(done.artifact.kept_fp32) == {OVERFLOWING, NORMALISING}
    assert read_artifact(tmp_path / "model.onnx").kept_fp32 == done.artifact.kept_fp32
    assert done.parity.mean_difference < 0.5
    weights = {t.name: t.data_type for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert weights[f"members.0.network.{OVERFLOWING}.weight"] == TensorProto.FLOAT
    assert list(weights.values()).count(TensorProto.FLOAT16) > 30


def test_half_equals_pytorchs_half(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    made = make_checkpoint(tmp_path / "best.pth")
    done = export(ExportSource(tmp_path / "best.pth"), tmp_path / "model.onnx", Target("fp16"))
    assert done.artifact.kept_fp32 == ()
    assert "fp16 rounding emulated" in done.parity.provider
    network = made.network().half()
    with torch.inference_mode():
        wanted = InferenceGraph(network, made.config, torch.float16).eval()(torch.from_numpy(images)).numpy()
    emulated = run(emulate_half(onnx.load(tmp_path / "model.onnx")), images)
    assert np.abs(emulated - wanted).max() <= 3
    with open_engine(tmp_path / "model.onnx", "cpu", 4) as engine:
        assert np.abs(engine.probability(images).astype(int) - wanted).max() <= 3


def small_model(scales: NDArray[np.float32]) -> onnx.ModelProto:
    """image -> float -> [network.first: * a, + b] -> [network.second: Resize by `scales`] -> - b -> float output."""
    constants = {"a": np.array([300.1], np.float32), "b": np.array([0.1], np.float32), "scales": scales}
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "a"], ["ax"], "multiply"),
        helper.make_node("Add", ["ax", "b"], ["axb"], "add"),
        helper.make_node("Resize", ["axb", "", "scales"], ["large"], "resize", mode="nearest"),
        helper.make_node("Sub", ["large", "b"], ["out"], "outside"),
    ]
    for node, scope in zip(nodes[1:4], ("first", "first", "second"), strict=True):
        node.metadata_props.add(key=SCOPES, value=str(["", "members.0.network", f"members.0.network.{scope}", "op"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 1, 4, 4])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("kept", [(), ("first",), ("second",), ("first", "second")])
def test_every_step_is_rounded_as_in_numpy(kept: tuple[str, ...]) -> None:
    image = np.arange(16, dtype=np.uint8).reshape(1, 1, 4, 4) * 17
    model = to_half(small_model(np.array([1, 1, 2, 2], np.float32)), kept)
    strip_metadata_props(model)
    onnx.checker.check_model(model, full_check=True)
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    assert kinds["scales"] == TensorProto.FLOAT  # Resize accepts them only in float32
    assert kinds["b"] == TensorProto.FLOAT  # for the node outside the network; the network has its own copy
    session = onnxruntime.InferenceSession(emulate_half(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"image": image})
    first: Any = np.float32 if "first" in kept else np.float16
    with np.errstate(over="ignore"):  # 17 * 15 * 300 overflows
        value = image.astype(first) * first(np.float32(300.1)) + first(np.float32(0.1))
        value = value.astype(np.float32 if "second" in kept else np.float16).repeat(2, 2).repeat(2, 3)
    wanted = value.astype(np.float32) - np.float32(0.1)
    assert np.array_equal(found, wanted)
    assert np.isinf(wanted).any() == (kept != ("first", "second"))


def test_layers_of_an_ensemble_have_distinct_names() -> None:
    model = small_model(np.array([1, 1, 2, 2], np.float32))
    scopes = model.graph.node[3].metadata_props[0]
    scopes.value = scopes.value.replace("members.0", "members.1")
    assert layers_of(model) == ["first", "1.second"]
    strip_metadata_props(model)
    assert layers_of(model) == []
