"""Static int8 quantisation with ONNX Runtime's quantiser.

Activation ranges are measured on images and weights are quantised per channel. The graph holds pairs of QuantizeLinear
and DequantizeLinear (QDQ), which runtimes replace by int8 kernels.

    cpu        unsigned asymmetric activations, 7-bit weights: with 8 bits the int8 product of CPUs without VNNI
               saturates, and the result would differ from that of CPUs with VNNI
    tensorrt   signed symmetric activations, 8-bit weights as QDQ pairs, float biases, as TensorRT requires; depthwise
               convolutions stay in float, because TensorRT for RTX would divide them into one kernel per channel
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from cloudrt.errors import DataError

from .graph import quiet
from .layers import layer_of, strip_metadata_props

TARGETS = ("cpu", "tensorrt")
_COMPUTE = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_ACTIVATIONS = ("Relu", "Clip")
OPERATORS = {
    # Every operator between two convolutions that has an int8 kernel, so that values stay int8 in between. Activations
    # are included, so that the range after each of them is quantised, not the wider range before it. The quantiser then
    # removes the activation, which the limits of that range make redundant.
    "cpu": (*_COMPUTE, *_ACTIVATIONS, "Add", "Mul", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool", "Resize"),
    "tensorrt": (*_COMPUTE, "Add"),
}
BATCH = 4


class Quantiser:
    """Converts a traced float32 model to int8; the activation ranges are measured once.

    Parameters
    ----------
    model
        Output of `trace`, with the exporter's metadata.
    images
        (N, H, W, 3) uint8 RGB, to measure the ranges on.
    target
        One of `TARGETS`.

    Raises
    ------
    DataError
        Unknown target.
    """

    def __init__(self, model: onnx.ModelProto, images: NDArray[np.uint8], target: str) -> None:
        if target not in TARGETS:
            raise DataError(f"the int8 target must be one of {', '.join(TARGETS)}, found {target!r}")
        self.target = target
        self.layer = {node.name: layer_of(node) for node in model.graph.node}
        self._float = _depthwise(model) if target == "tensorrt" else set()
        self._join_activations(model)
        taken = [n.name for n in model.graph.node if n.op_type in OPERATORS[target] and n.name not in self._float]
        self.layers = list(dict.fromkeys(layer for name in taken if (layer := self.layer[name]) is not None))
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        strip_metadata_props(self.model)
        self._ranges = _measure_ranges(self.model, images, OPERATORS[target])

    def _join_activations(self, model: onnx.ModelProto) -> None:
        """Assign each activation to the layer before it, so that both have the same precision."""
        makers = {name: node for node in model.graph.node for name in node.output}
        for node in model.graph.node:
            if node.op_type in _ACTIVATIONS:
                maker = makers.get(node.input[0])
                if maker is not None and maker.op_type in OPERATORS[self.target]:
                    self.layer[node.name] = self.layer[maker.name]
                else:
                    self._float.add(node.name)

    def quantise(self, kept: Collection[str] = ()) -> onnx.ModelProto:
        """Return the model with int8 layers, except those `kept` and everything outside the network."""
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        tensorrt = self.target == "tensorrt"
        copy = onnx.ModelProto()
        copy.CopyFrom(self.model)
        stay = [name for name, layer in self.layer.items() if layer is None or layer in kept or name in self._float]
        options: dict[str, Any] = {"ActivationSymmetric": tensorrt, "WeightSymmetric": True}
        if tensorrt:
            options |= {"QuantizeBias": False, "AddQDQPairToWeight": True, "DedicatedQDQPair": True}
        activations = QuantType.QInt8 if tensorrt else QuantType.QUInt8
        with quiet():
            quantizer = QDQQuantizer(
                copy,
                per_channel=True,
                reduce_range=not tensorrt,
                weight_qType=QuantType.QInt8,
                activation_qType=activations,
                tensors_range=self._ranges,
                nodes_to_quantize=[],
                nodes_to_exclude=stay,
                op_types_to_quantize=list(OPERATORS[self.target]),
                extra_options=options,
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
        model = quantizer.model.model
        assert isinstance(model, onnx.ModelProto)
        return model


def _depthwise(model: onnx.ModelProto) -> set[str]:
    """Return the names of the convolutions whose filters each read one of several channels."""
    single = {tensor.name for tensor in model.graph.initializer if list(tensor.dims[1:2]) == [1]}
    return {
        node.name
        for node in model.graph.node
        if node.op_type == "Conv" and node.input[1] in single
        if any(attribute.name == "group" and attribute.i > 1 for attribute in node.attribute)
    }


def _measure_ranges(model: onnx.ModelProto, images: NDArray[np.uint8], operators: tuple[str, ...]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        begin = 0

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            batch = images[self.begin : self.begin + BATCH]
            self.begin += len(batch)
            return {"image": batch} if len(batch) else None

    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        calibrator = create_calibrator(
            path, list(operators), str(Path(folder) / "augmented.onnx"), calibrate_method=CalibrationMethod.MinMax
        )
        calibrator.collect_data(Reader())
        return calibrator.compute_data()
