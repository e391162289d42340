"""TensorRT for RTX builds engines of real artifacts, ahead of time and without a GPU; nothing runs here.

The matrix of encoders, precisions and targets is slow; `make test` builds the shipped artifact and a tiny one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import pytest
from onnx import helper
from support.tiny import SMALL_GRIDS, tiny_model

from cloudrt.engines import tensorrt_check
from cloudrt.engines.tensorrt_check import TARGETS, check
from cloudrt.errors import ArtifactError, ProviderError
from cloudrt.model.artifact import parse_artifact
from cloudrt.model.onnx_file import load_model

if TYPE_CHECKING:
    from cloudrt.export.source import ExportSource

needs_tensorrt = pytest.mark.skipif(not tensorrt_check.is_installed(), reason="TensorRT for RTX is not installed")
SHIPPED = Path(tensorrt_check.__file__).parents[1] / "model" / "shipped" / "clouds.onnx"


@needs_tensorrt
def test_the_shipped_artifact_is_built_for_every_target() -> None:
    model = load_model(SHIPPED)
    found = check(model, parse_artifact(model, SHIPPED), 8)
    assert [engine.target for engine in found.engines] == list(TARGETS) == ["sm86", "sm89", "sm120"]
    assert found.layers > 100
    weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    assert all(weights / 2 < engine.bytes < 10 * weights for engine in found.engines)


@needs_tensorrt
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_tiny_artifact_is_built(precision: str) -> None:
    """The artifact that the other tests of engines run."""
    model = tiny_model(labels=SMALL_GRIDS, precision=precision, presence=True)
    assert check(model, parse_artifact(model, "m"), 4, ["sm89"]).engines[0].bytes > 0


@needs_tensorrt
def test_errors_of_the_parser_are_reported() -> None:
    model = tiny_model(labels=SMALL_GRIDS)
    next(node for node in model.graph.node if node.op_type == "Sigmoid").op_type = "Sigmoidal"
    with pytest.raises(ArtifactError, match=r"TensorRT's parser refuses the model: .*Sigmoidal") as caught:
        check(model, parse_artifact(model, "m"))
    assert "\n" not in str(caught.value)


@needs_tensorrt
def test_errors_of_the_builder_are_reported() -> None:
    """A graph with a fixed batch of four does not fit the profile of another batch size."""
    model = tiny_model(labels=SMALL_GRIDS)
    graph = model.graph
    first = next(node for node in graph.node if node.op_type == "Transpose")
    graph.initializer.append(helper.make_tensor("four", onnx.TensorProto.INT64, [4], [4, 64, 96, 3]))
    nodes = [graph.node[0], helper.make_node("Reshape", [first.input[0], "four"], ["of_four"]), *graph.node[1:]]
    first.input[0] = "of_four"
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    assert check(model, parse_artifact(model, "m"), 4, ["sm89"]).engines
    with pytest.raises(ArtifactError, match="TensorRT cannot build an engine for sm89: ") as caught:
        check(model, parse_artifact(model, "m"), 8, ["sm89"])
    assert "\n" not in str(caught.value) and "no reason" not in str(caught.value)


@needs_tensorrt
def test_outputs_must_be_bytes() -> None:
    model = tiny_model(labels=SMALL_GRIDS)
    artifact = parse_artifact(model, "m")
    last = next(node for node in model.graph.node if "probability" in node.output)
    assert last.op_type == "Cast"
    last.attribute[0].i = model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    with pytest.raises(ArtifactError, match=r"TensorRT parses probability as .*, expected uint8"):
        check(model, artifact, 4, ["sm89"])


def test_without_tensorrt_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_check, "find_spec", lambda name: None)
    model = tiny_model(labels=SMALL_GRIDS)
    with pytest.raises(ProviderError, match=r"pip install '\.\[tensorrt-check\]'"):
        check(model, parse_artifact(model, "m"))


ENCODERS = (
    *("resnet50", "se_resnext101_32x4d", "efficientnet-b2", "densenet121"),
    *("tu-tf_efficientnet_lite0", "tu-regnety_002"),
)
FORMS: dict[str, dict[str, Any]] = {encoder: {"encoder": encoder} for encoder in ENCODERS} | {
    "all flips": {"tta": "hv"},
    "presence head": {"presence": "head", "tta": "hv"},
    "presence top-k": {"presence": "top-k", "top_k": 2000, "tta": "hv"},
    "presence top-k of many": {"presence": "top-k", "top_k": 5000},
    "ensemble of two": {"members": 2},
}
"""Name -> how the network differs from a ResNet-18 without flips or presence."""


@pytest.fixture(scope="module", params=list(FORMS))
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExportSource:
    """Networks with random weights, traced and simplified."""
    from cloudrt.export.graph import simplify
    from cloudrt.export.source import ExportSource, SourceOptions
    from support.networks import make_checkpoint

    form = dict(FORMS[request.param])
    tta, members = str(form.pop("tta", "none")), int(str(form.pop("members", 1)))
    folder = tmp_path_factory.mktemp("traced")
    paths = [folder / f"{number}.pth" for number in range(members)]
    for number, path in enumerate(paths):
        make_checkpoint(path, seed=number, **{"encoder": "resnet18", "input_size": (192, 288), **form})
    source = ExportSource(paths, SourceOptions(tta=tta, calibrate=True, max_images=4))
    source.model = simplify(source.model)
    return source


@pytest.mark.slow
@needs_tensorrt
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_form_is_built_for_every_target(
    traced: ExportSource, precision: str, record_property: Callable[[str, object], None]
) -> None:
    from cloudrt.export.graph import describe, finish
    from cloudrt.export.half import to_half
    from cloudrt.export.int8 import Quantiser

    model, layout = traced.model, ""
    if precision == "fp16":
        model = to_half(model)
    elif precision == "int8":
        layout = "tensorrt"
        model = Quantiser(model, traced.calibration.images, layout).quantise()
    artifact = describe(traced.ensemble, precision, int8_target=layout)
    found = check(finish(model, artifact), artifact, 8)
    record_property("tensorrt", found.to_dict())
    assert [engine.target for engine in found.engines] == list(TARGETS)
    weights = sum(tensor.numel() for one in traced.ensemble.checkpoints for tensor in one.weights.values())
    assert all(100_000 < engine.bytes < 2 * 4 * weights for engine in found.engines)
