"""Conversion of an fp16 artifact to float32, for providers that would only emulate fp16.

The weights keep their fp16 values; only the arithmetic is in float32. Without the conversion, ONNX Runtime's CPU
provider inserts casts around every node.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

HALF, SINGLE = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT


def widen(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of `model` whose fp16 tensors and casts are float32; the metadata is not changed."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    for initializer in graph.initializer:
        _widen_tensor(initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and node.op_type == "Cast" and attribute.i == HALF:
                attribute.i = SINGLE
            if attribute.HasField("t"):
                _widen_tensor(attribute.t)
    for value in [*graph.value_info, *graph.input, *graph.output]:
        if value.type.tensor_type.elem_type == HALF:
            value.type.tensor_type.elem_type = SINGLE
    return wide


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == HALF:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
