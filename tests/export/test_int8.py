"""int8: QDQ as each target requires, checked by the gate."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from cloudrt.export.export import Target, export
from cloudrt.export.gate import Gate
from cloudrt.export.half import to_half
from cloudrt.export.int8 import Quantiser
from cloudrt.export.source import ExportSource, SourceOptions
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from support.networks import make_checkpoint

from cloudrt.cli.export import export as command
from cloudrt.engines.choice import open_engine
from cloudrt.errors import DataError, ProviderError
from cloudrt.labels import Labels
from cloudrt.model.artifact import Artifact, read_artifact
from cloudrt.model.parity import Tolerances

WIDE = Tolerances(8.0, 0.5, 1.0)
"""Tolerances for networks with random weights, whose masks change if levels change by 1."""


@pytest.fixture(scope="module", params=["cpu", "tensorrt"])
def quantised(request: pytest.FixtureRequest, source: ExportSource) -> tuple[str, onnx.ModelProto]:
    model = Quantiser(source.model, source.calibration.images, request.param).quantise()
    onnx.checker.check_model(model, full_check=True)
    return request.param, model


def constants(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def dequantised_inputs(model: onnx.ModelProto, operator: str, position: int) -> list[onnx.NodeProto]:
    """Return the DequantizeLinear nodes that feed one input of every node of a type."""
    made = {node.output[0]: node for node in model.graph.node}
    found = [made.get(node.input[position]) for node in model.graph.node if node.op_type == operator]
    assert all(node is not None and node.op_type == "DequantizeLinear" for node in found)
    return [node for node in found if node is not None]


def test_activations_are_quantised_as_the_target_requires(quantised: tuple[str, onnx.ModelProto]) -> None:
    target, model = quantised
    values = constants(model)
    zeros = [values[node.input[2]] for node in dequantised_inputs(model, "Conv", 0)]
    assert len(zeros) > 30
    if target == "cpu":
        assert {zero.dtype for zero in zeros} == {np.dtype(np.uint8)}
        assert len({int(zero) for zero in zeros}) > 1
    else:
        assert {(zero.dtype, int(zero)) for zero in zeros} == {(np.dtype(np.int8), 0)}


def test_weights_are_per_channel_symmetric_and_close(
    quantised: tuple[str, onnx.ModelProto], source: ExportSource
) -> None:
    target, model = quantised
    values, originals = constants(model), constants(source.model)
    made = {node.output[0]: node for node in model.graph.node}
    for node in dequantised_inputs(model, "Conv", 1):
        if target == "tensorrt":  # float weights, then a QDQ pair
            pair = made[node.input[0]]
            assert pair.op_type == "QuantizeLinear"
            original, scale, zero = values[pair.input[0]], values[pair.input[1]], values[pair.input[2]]
            assert not zero.any()
            assert scale.shape == (len(original),)
            assert (np.abs(original).max((1, 2, 3)) <= 127.5 * scale).all()
            continue
        levels, scale, zero = (values[name] for name in node.input)
        assert levels.dtype == np.int8
        assert not zero.any()
        assert scale.shape == (len(levels),)
        assert np.abs(levels).max() <= 64  # the sum of two products with 255 fits 16 bits
        original = originals[node.input[0].removesuffix("_quantized")]
        error = np.abs(levels.astype(np.float32) * scale[:, None, None, None] - original)
        assert (error <= scale[:, None, None, None] * 0.501 + 1e-9).all()


def test_what_is_outside_the_network_or_kept_stays_float(source: ExportSource) -> None:
    quantiser = Quantiser(source.model, source.calibration.images, "cpu")
    kept = quantiser.layers[:2] + quantiser.layers[-3:]
    model = quantiser.quantise(kept)
    by_name = {node.name: node for node in model.graph.node}
    made = {node.output[0]: node for node in model.graph.node}
    checked = 0
    for name, layer in quantiser.layer.items():
        node = by_name.get(name)
        if node is None or (layer is not None and layer not in kept):
            continue
        weights = [made[value] for value in node.input if value in made and "weight" in value]
        assert not weights, name  # the float constant itself, not its QDQ pair
        checked += 1
    assert checked > 20


def test_no_range_is_spent_on_values_that_an_activation_cuts_off(source: ExportSource) -> None:
    """QDQ between a convolution and its activation would spend part of its range on what the activation sets to 0."""
    quantiser = Quantiser(source.model, source.calibration.images, "cpu")
    for kept in ((), quantiser.layers[::3]):
        model = quantiser.quantise(kept)
        makers = {name: node.op_type for node in model.graph.node for name in node.output}
        activations = [node for node in model.graph.node if node.op_type in ("Relu", "Clip")]
        assert [node.name for node in activations if makers.get(node.input[0]) == "DequantizeLinear"] == []
        assert activations or not kept  # float layers keep theirs


def test_convolutions_run_in_int8_on_the_cpu(source: ExportSource, tmp_path: Path) -> None:
    """ONNX Runtime's optimised graph shows the kernels."""
    done = export(source, tmp_path / "model.onnx", Target("int8", tolerances=WIDE))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(done.path), options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert kinds["QLinearConv"] > 30
    assert kinds["Conv"] + kinds["FusedConv"] <= len(done.artifact.kept_fp32)
    said = read_artifact(done.path)
    assert (said.precision, said.int8_target) == ("int8", "cpu")
    assert done.bytes < 0.4 * export(source, tmp_path / "fp32.onnx", Target("fp32")).bytes
    assert done.speed is not None
    assert done.speed > 0


def test_the_gate_of_int8_runs_the_kernels_that_inference_runs(source: ExportSource, tmp_path: Path) -> None:
    done = export(source, tmp_path / "model.onnx", Target("int8", tolerances=WIDE))
    assert done.parity.provider == "cpu"
    with open_engine(done.path, "cpu", None) as engine:
        parity = source.reference.measure(engine.run)
    assert parity == done.parity


def test_int8_for_tensorrt_is_emulated_on_the_cpu(source: ExportSource, tmp_path: Path) -> None:
    target = Target("int8", int8_target="tensorrt", tolerances=WIDE, provider="cpu")
    done = export(source, tmp_path / "model.onnx", target)
    assert done.parity.provider == "cpu, TensorRT's int8 emulated"
    assert done.speed is None


EXACT = Labels(("a", "b", "c", "d"), (32, 48), (32, 48))


def exact_layers() -> dict[str, NDArray[Any]]:
    """int8 weights of two convolutions, 3x3 and 1x1: all weights of one output channel of the first are 127."""
    rng = np.random.default_rng(0)
    first = rng.integers(-127, 128, (8, 3, 3, 3), np.int8)
    first[0] = 127
    return {"first": first, "second": rng.integers(-127, 128, (4, 8, 1, 1), np.int8)}


def exact_model() -> onnx.ModelProto:
    """A network in TensorRT's layout (signed, symmetric, QDQ) that float32 computes without rounding.

    Every scale is a power of two and no sum exceeds 24 bits, so that every order of summation gives the same bits. The
    bias keeps the quantised values away from ties by more than float32's resolution.
    """
    constants = {
        **exact_layers(),
        "centre": np.array(128, np.float32),
        "one": np.array(1, np.float32),
        "sixteen": np.array(16, np.float32),
        "zero": np.array(0, np.int8),
        "first_scale": np.full(8, 2**-7, np.float32),
        "second_scale": np.full(4, 2**-11, np.float32),
        "first_zero": np.zeros(8, np.int8),
        "second_zero": np.zeros(4, np.int8),
        "first_bias": np.full(8, 2**-8, np.float32),
        "second_bias": np.full(4, 2**-8, np.float32),
        "lowest": np.array(0, np.float32),
        "highest": np.array(255, np.float32),
    }
    make = helper.make_node

    def qdq(name: str, scale: str, made: str) -> list[onnx.NodeProto]:
        return [
            make("QuantizeLinear", [name, scale, "zero"], [f"{name}_levels"]),
            make("DequantizeLinear", [f"{name}_levels", scale, "zero"], [made]),
        ]

    nodes = [
        make("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        make("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        make("Sub", ["planes", "centre"], ["centred"]),
        *qdq("centred", "one", "x0"),
        make("DequantizeLinear", ["first", "first_scale", "first_zero"], ["w1"], axis=0),
        make("Conv", ["x0", "w1", "first_bias"], ["y1"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        make("Relu", ["y1"], ["z1"]),
        *qdq("z1", "sixteen", "x1"),
        make("DequantizeLinear", ["second", "second_scale", "second_zero"], ["w2"], axis=0),
        make("Conv", ["x1", "w2", "second_bias"], ["y2"], kernel_shape=[1, 1]),
        *qdq("y2", "one", "x2"),
        make("Add", ["x2", "centre"], ["shifted"]),
        make("Clip", ["shifted", "lowest", "highest"], ["bounded"]),
        make("Transpose", ["bounded"], ["turned"], perm=[0, 1, 3, 2]),
        make("Cast", ["turned"], ["probability"], to=TensorProto.UINT8),
    ]
    graph = helper.make_graph(
        nodes,
        "exact",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 32, 48, 3])],
        [helper.make_tensor_value_info("probability", TensorProto.UINT8, ["N", 4, 48, 32])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def exact_answers(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The same network in 64-bit integers."""

    def rounded(numerator: NDArray[np.int64], denominator: int) -> NDArray[np.int64]:
        assert (2 * (numerator % denominator) != denominator).all()  # no ties
        return np.clip((2 * numerator + denominator) // (2 * denominator), -128, 127)

    layers = {name: weights.astype(np.int64) for name, weights in exact_layers().items()}
    x = np.pad(images.astype(np.int64) - 128, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))  # (N, H, W, 3, 3, 3), channels before taps
    y = np.einsum("nhwcij,kcij->nkhw", windows, layers["first"])
    x = rounded(np.maximum(2 * y + 1, 0), 2**8 * 16)
    y = np.einsum("nchw,kc->nkhw", x, layers["second"][:, :, 0, 0])
    return (rounded(2 * y + 1, 2**8) + 128).transpose(0, 1, 3, 2)


def test_the_emulation_of_tensorrts_int8_is_exact(source: ExportSource) -> None:
    """Kernels whose 16-bit sums saturate, as those of CPUs without VNNI do, would give other levels."""
    images = np.random.default_rng(1).integers(0, 256, (3, 32, 48, 3), np.uint8)
    images[0, :16], images[0, 16:] = 255, 0
    artifact = Artifact(labels=EXACT, input_size=(32, 48), precision="int8", int8_target="tensorrt")
    wanted = exact_answers(images)
    assert len(np.unique(wanted)) > 150
    with Gate(source.reference, WIDE, artifact, "cpu").open(exact_model()) as engine:
        assert np.array_equal(engine.run(images)[0], wanted)


def test_emulated_int8_is_judged_by_a_margin(source: ExportSource, tmp_path: Path) -> None:
    """The limit is lowered by 0.05 levels, because the mean difference may be that much larger in TensorRT."""
    found = export(source, tmp_path / "all.onnx", Target("int8", "tensorrt", tolerances=WIDE)).parity.mean_difference
    for margin, passes in ((0.06, True), (0.04, False)):
        done = export(
            source, tmp_path / "model.onnx", Target("int8", "tensorrt", tolerances=Tolerances(found + margin, 0.0, 1.0))
        )
        assert (not done.artifact.kept_fp32) == passes
        assert done.tolerances.mean_difference == pytest.approx(found + margin - 0.05)
    done = export(source, tmp_path / "cpu.onnx", Target("int8", tolerances=WIDE))
    assert done.tolerances == WIDE  # measured with the kernels that inference runs


def test_layers_with_large_errors_are_kept_in_fp32(source: ExportSource, tmp_path: Path) -> None:
    """With half the error of all layers in int8 as the limit, some layers must stay in fp32, and the gate passes."""
    everything = export(source, tmp_path / "all.onnx", Target("int8", tolerances=WIDE)).parity.mean_difference
    some = Tolerances(everything / 2, 0.0, 1.0)
    done = export(source, tmp_path / "some.onnx", Target("int8", tolerances=some))
    assert 0 < len(done.artifact.kept_fp32) < done.layers
    assert done.parity.mean_difference <= some.mean_difference
    assert read_artifact(done.path).kept_fp32 == done.artifact.kept_fp32


def test_the_provider_of_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloudrt.export.gate.problem", lambda name: f"no {name}")
    assert Target("int8").gate_provider() == "cpu"
    assert Target("int8", "tensorrt").gate_provider() == "cpu"
    assert Target("int8", "tensorrt", "cpu").gate_provider() == "cpu"
    with pytest.raises(ProviderError, match="refused for int8"):
        Target("int8", "cpu", "cuda").gate_provider()
    with pytest.raises(ProviderError, match="refused for int8"):
        Target("int8", "tensorrt", "openvino").gate_provider()
    with pytest.raises(DataError, match="target"):
        Target("int8", "tpu")
    with pytest.raises(DataError, match="precision"):
        Target("int4")


def test_all_precisions_in_one_table(checkpoint: Path, tmp_path: Path) -> None:
    words = [str(checkpoint), "-o", str(tmp_path / "m.onnx"), "--precision", "all"]
    wide = ["--max-mean-difference", "8", "--min-dice", "0.5", "--max-empty-mismatch", "1"]
    done = CliRunner().invoke(command, [*words, *wide, "--stats", str(tmp_path / "figures.json")])
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [one["precision"] for one in figures["artifacts"]] == ["fp32", "fp16", "int8"]
    for one in figures["artifacts"]:
        written = tmp_path / f"m.{one['precision']}.onnx"
        assert one["bytes"] == written.stat().st_size
        assert one["parity"] == read_artifact(written).parity
    assert str(tmp_path) not in json.dumps(figures)
    (tmp_path / "figures.json").unlink()
    assert {path.name for path in tmp_path.iterdir()} == {f"m.{name}.onnx" for name in ("fp32", "fp16", "int8")}
    for name in ("fp32", "fp16", "int8"):
        assert read_artifact(tmp_path / f"m.{name}.onnx").precision == name
    assert "speed relative to the fp32 artifact" in done.output
    assert "as fp32" in done.output


def test_the_precisions_that_pass_are_written_beside_one_that_does_not(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: onnx.ModelProto, kept: object) -> onnx.ModelProto:
        other = to_half(model)
        (sigmoid,) = [node for node in other.graph.node if node.op_type == "Sigmoid"]
        sigmoid.op_type = "Tanh"
        return other

    monkeypatch.setattr("cloudrt.export.export.to_half", wrong)
    words = [str(checkpoint), "-o", str(tmp_path / "m.onnx"), "--precision", "all"]
    done = CliRunner().invoke(
        command, [*words, "--min-dice", "0.5", "--max-empty-mismatch", "1", "--max-mean-difference", "8"]
    )
    assert done.exit_code == 2, done.output
    assert "refused by the gate and not written: fp16" in done.output
    assert {path.name for path in tmp_path.iterdir()} == {"m.fp32.onnx", "m.int8.onnx"}


def test_quantising_is_repeatable_and_leaves_the_network_unchanged(source: ExportSource) -> None:
    before = source.model.SerializeToString()
    quantiser = Quantiser(source.model, source.calibration.images[:4], "cpu")
    first, again = quantiser.quantise(), quantiser.quantise()
    assert source.model.SerializeToString() == before
    assert first.SerializeToString() == again.SerializeToString()


def test_depthwise_convolutions_stay_float_for_tensorrt(tmp_path: Path) -> None:
    """TensorRT for RTX would divide each into as many kernels as it has channels."""
    path = tmp_path / "best.pth"
    make_checkpoint(path, "mobilenet_v2")
    source = ExportSource(path, SourceOptions(calibrate=True, max_images=4))
    for target in ("cpu", "tensorrt"):
        quantiser = Quantiser(source.model, source.calibration.images, target)
        graph = quantiser.quantise().graph
        dequantised = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
        convolutions = [node for node in graph.node if node.op_type == "Conv"]
        depthwise = [node for node in convolutions if helper.get_node_attr_value(node, "group") > 1]
        assert len(depthwise) == 17  # the blocks of MobileNetV2, Table 2 of arXiv:1801.04381
        taken = {node.name for node in convolutions if node.input[0] in dequantised or node.input[1] in dequantised}
        floating = {node.name for node in convolutions} - taken
        assert floating == (set() if target == "cpu" else {node.name for node in depthwise})
