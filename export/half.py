"""Lower the layers of a float32 graph to fp16; kept layers and everything outside the network stay float32.

A constant that is needed in both types is copied, which ONNX Runtime's converter does not do, and a value gets at most
one cast to each type.
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
"""Operator -> inputs that are always float32: Resize's region of interest and scales."""


def to_half(model: onnx.ModelProto, kept: Collection[str] = ()) -> onnx.ModelProto:
    """Return a copy of a traced float32 model whose layers compute in fp16, except those `kept`.

    Parameters
    ----------
    model
        Output of `trace`, with the exporter's metadata.
    kept
        Names of layers, see `layers_of`.
    """
    lowered = onnx.ModelProto()
    lowered.CopyFrom(model)
    del lowered.graph.value_info[:]
    _Lowering(lowered.graph, _float_values(model), frozenset(kept)).run()
    return lowered


def _float_values(model: onnx.ModelProto) -> set[str]:
    """Return the names of the float32 values of the graph, constants included."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = {v.name for v in [*graph.value_info, *graph.input, *graph.output] if v.type.tensor_type.elem_type == FLOAT}
    return values | {tensor.name for tensor in graph.initializer if tensor.data_type == FLOAT}


class _Lowering:
    """Rewires each node of a graph to inputs of the type that it computes in."""

    def __init__(self, graph: onnx.GraphProto, floats: set[str], kept: frozenset[str]) -> None:
        self.graph = graph
        self.floats = floats
        self.kept = kept
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.halves: set[str] = set()  # fp16 values of the lowered graph
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
            assert value.name not in self.halves, "the graph's outputs are computed outside the network"
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
        """Return the name of value `name` in type `kind`, adding a cast or a copy of the constant if needed."""
        if (HALF if name in self.halves else FLOAT) == kind:
            return name
        if (name, kind) not in self.casts:
            other = f"{name}_{'fp16' if kind == HALF else 'fp32'}"
            if name in self.constants:
                self.constants[other] = _half(self.constants[name], other)
            else:
                self.nodes.append(helper.make_node("Cast", [name], [other], name=f"{other}_cast", to=kind))
            self.casts[name, kind] = other
        return self.casts[name, kind]


def _lower_attributes(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == FLOAT:
            attribute.i = HALF
        if attribute.HasField("t") and attribute.t.data_type == FLOAT:
            attribute.t.CopyFrom(_half(attribute.t, attribute.t.name))


def _half(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    with np.errstate(over="ignore"):  # becomes infinity; the gate measures the effect
        return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), name)


def emulate_half(half: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float32 model that rounds and overflows wherever a device with fp16 would.

    ONNX Runtime's CPU provider computes chains of fp16 nodes in float32, which hides rounding and overflow. Here every
    fp16 value is cast to fp16 and back, as on a device that accumulates in float32 and stores fp16.
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
