"""Count the floating-point operations of a network from its graph."""

from __future__ import annotations

import math

import onnx
from onnx import shape_inference

from cloudrt.model.onnx_file import fix_batch


def count_flops(model: onnx.ModelProto) -> float:
    """Return the operations per image: two for each multiply-add of convolutions and matrix products.

    Resizes, activations and other operators are not counted, as is customary; they are a few percent.

    Parameters
    ----------
    model
        An artifact, in floating point or with QDQ pairs around its layers.
    """
    inferred = shape_inference.infer_shapes(fix_batch(model, 1), data_prop=True)
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for values in (inferred.graph.value_info, inferred.graph.input, inferred.graph.output)
        for value in values
    }
    shapes |= {initializer.name: list(initializer.dims) for initializer in inferred.graph.initializer}
    return float(sum(_count(node, shapes) for node in inferred.graph.node))


def _count(node: onnx.NodeProto, shapes: dict[str, list[int]]) -> int:
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return 0
    first, second = (shapes[name] for name in node.input[:2])
    made = shapes[node.output[0]]
    if node.op_type == "Conv":  # weights (out, in / groups, kernel...)
        return 2 * math.prod(made) * math.prod(second[1:])
    if node.op_type == "ConvTranspose":  # weights (in, out / groups, kernel...)
        return 2 * math.prod(first) * math.prod(second[1:])
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return 2 * math.prod(made) * first[0 if transposed else -1]
