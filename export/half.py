"""Lower a float32 graph to fp16, layer by layer; other layers, and all that is outside the network, stay float32.

ONNX Runtime's own converter shares constants between nodes that need different types; here every constant is copied
where two types of it are needed, and each crossing between the two types gets one cast.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import helper, numpy_helper

from cloudrt.engines.widen import widen

from .layers import layer_of

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
STAY_FLOAT = {"Resize": (1, 2)}
"""Inputs, by number, that an operator takes in float32 whatever its data are: Resize's region and scales."""


def to_half(model: onnx.ModelProto, kept: Collection[str] = ()) -> onnx.ModelProto:
    """Return a copy of a traced float32 model whose layers compute in fp16, all but those `kept`.

    Parameters
    ----------
    model
        As `trace` gives it, with the exporter's notes.
    kept
        Names of layers, as `layers_of` gives them.
    """
    lowered = onnx.ModelProto()
    lowered.CopyFrom(model)
    del lowered.graph.value_info[:]
    _Lowering(lowered.graph, _float_values(model), frozenset(kept)).run()
    return lowered


def _float_values(model: onnx.ModelProto) -> set[str]:
    """Names of the float32 values of the graph, constants included."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = {v.name for v in [*graph.value_info, *graph.input, *graph.output] if v.type.tensor_type.elem_type == FLOAT}
    return values | {tensor.name for tensor in graph.initializer if tensor.data_type == FLOAT}


class _Lowering:
    """One graph on its way to fp16: rewires each node to values of the type that it computes in."""

    def __init__(self, graph: onnx.GraphProto, floats: set[str], kept: frozenset[str]) -> None:
        self.graph = graph
        self.floats = floats
        self.kept = kept
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.halves: set[str] = set()  # values that are fp16 in the lowered graph
        self.casts: dict[tuple[str, int], str] = {}
        self.nodes: list[onnx.NodeProto] = []

    def run(self) -> None:
        for node in list(self.graph.node):
            lowered = self._is_lowered(node)
            for position, name in enumerate(node.input):
                stays = position in STAY_FLOAT.get(node.op_type, ())
                if name in self.floats:
                    node.input[position] = self._as(name, HALF if lowered and not stays else FLOAT)
            if lowered:
                _lower_attributes(node)
                self.halves |= {name for name in node.output if name in self.floats}
            self.nodes.append(node)
        for value in self.graph.output:
            assert value.name not in self.halves, "the graph's outputs come from outside the network"
        used = {name for node in self.nodes for name in node.input}
        constants = [tensor for tensor in self.constants.values() if tensor.name in used]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(constants)

    def _is_lowered(self, node: onnx.NodeProto) -> bool:
        layer = layer_of(node)
        has_body = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
        return layer is not None and layer not in self.kept and not has_body

    def _as(self, name: str, kind: int) -> str:
        """Return the name of the value `name` in another type, made where it is not there yet."""
        if (HALF if name in self.halves else FLOAT) == kind:
            return name
        if (name, kind) not in self.casts:
            other = f"{name}_{'fp16' if kind == HALF else 'fp32'}"
            if name in self.constants:
                with np.errstate(over="ignore"):  # infinity then: the gate sees what that does
                    half = numpy_helper.to_array(self.constants[name]).astype(np.float16)
                self.constants[other] = numpy_helper.from_array(half, other)
            else:
                self.nodes.append(helper.make_node("Cast", [name], [other], name=f"{other}_cast", to=kind))
            self.casts[name, kind] = other
        return self.casts[name, kind]


def _lower_attributes(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == FLOAT:
            attribute.i = HALF
        if attribute.HasField("t") and attribute.t.data_type == FLOAT:
            half = numpy_helper.to_array(attribute.t).astype(np.float16)
            attribute.t.CopyFrom(numpy_helper.from_array(half, attribute.t.name))


def emulate_half(half: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float32 model that rounds, and overflows, wherever a device with fp16 would.

    ONNX Runtime's CPU provider computes chains of fp16 nodes in float32 and so hides what fp16 does to them. Here every
    fp16 value is cast to fp16 and back: what a device gives that sums in float32 and stores in fp16.
    """
    inferred = onnx.shape_inference.infer_shapes(half).graph
    halves = {value.name for value in inferred.value_info if value.type.tensor_type.elem_type == HALF}
    emulated = widen(half)
    nodes = []
    for node in emulated.graph.node:
        nodes.append(node)
        for position, name in enumerate(node.output):
            if name in halves:
                node.output[position] = f"{name}_exact"
                rounding = ((f"{name}_exact", f"{name}_rounded", HALF), (f"{name}_rounded", name, FLOAT))
                nodes += [helper.make_node("Cast", [a], [b], name=f"{b}_from_{a}", to=kind) for a, b, kind in rounding]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del emulated.graph.node[:], emulated.graph.value_info[:]
    emulated.graph.node.extend(nodes)
    return emulated
