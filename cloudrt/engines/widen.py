"""Turn a fp16 artifact into the same network in float32, for providers that would only emulate fp16.

The weights keep the values that fp16 gave them; only the arithmetic between them becomes exact. ONNX Runtime's CPU
provider otherwise puts a cast around every node.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

HALF, SINGLE = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT


def widen(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of `model` whose fp16 tensors and casts are float32; its metadata stay."""
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
