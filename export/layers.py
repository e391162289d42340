"""Map each node of the graph to the PyTorch module that it comes from.

The exporter stores the names of the modules that called a node in the node's `metadata_props`. They tell which nodes
form a layer, which a conversion can lower to fp16 or int8 or keep in fp32, and which nodes are outside the network and
always stay in float32.
"""

from __future__ import annotations

import onnx

SCOPES = "pkg.torch.onnx.name_scopes"
NETWORK = ".network"
"""The wrapper's name for each network: "members.0.network.encoder.conv1" is the first member's encoder.conv1."""


def layer_of(node: onnx.NodeProto) -> str | None:
    """Return the layer of a node, such as "encoder.layer1.0.conv1", or None for a node outside every network.

    In an ensemble, the layers of all members but the first begin with the member's index: "1.encoder.conv1" is the
    second member's. A convolution is named after its weights, because the exporter names one with a folded BatchNorm
    after the BatchNorm.
    """
    if node.op_type in ("Conv", "ConvTranspose") and node.input[1].endswith(".weight"):
        return _name(node.input[1].removesuffix(".weight"))
    for prop in node.metadata_props:
        if prop.key == SCOPES:
            return _layer(prop.value)
    return None


def layers_of(model: onnx.ModelProto) -> list[str]:
    """Return the layers of every network in the graph, in execution order."""
    return list(dict.fromkeys(layer for node in model.graph.node if (layer := layer_of(node)) is not None))


def copy_metadata_props(source: onnx.ModelProto, target: onnx.ModelProto) -> None:
    """Copy the exporter's metadata of nodes to those of `target` with the same name, else the same first output."""
    by_name = {node.name: node for node in source.graph.node}
    by_output = {node.output[0]: node for node in source.graph.node}
    for node in target.graph.node:
        origin = by_name.get(node.name) or by_output.get(node.output[0])
        if origin is not None and not node.metadata_props:
            node.metadata_props.extend(origin.metadata_props)


def strip_metadata_props(model: onnx.ModelProto) -> None:
    """Remove the exporter's metadata, which is large and names source files of this machine."""
    graph = model.graph
    for item in [*graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output]:
        del item.metadata_props[:]
        item.doc_string = ""
    del model.metadata_props[:]
    del graph.metadata_props[:]
    model.doc_string = graph.doc_string = ""


def _layer(text: str) -> str | None:
    # A list of Python strings, innermost last: ['', 'members.0.network', ..., 'members.0.network.head.0', 'conv2d_7'].
    scopes = [scope.strip().strip("'\"") for scope in text.strip("[] ").split(",")]
    return next((name for scope in reversed(scopes[:-1]) if (name := _name(scope)) is not None), None)


def _name(scope: str) -> str | None:
    member, inside, layer = scope.partition(NETWORK)
    if not inside or not member.startswith("members."):
        return None
    number = member.removeprefix("members.")
    name = layer.removeprefix(".") or "network"
    return name if number == "0" else f"{number}.{name}"
