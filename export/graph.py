"""From a checkpoint to an ONNX model: one graph, uint8 image in, uint8 probability out."""

from __future__ import annotations

import logging
import warnings
from importlib.metadata import PackageNotFoundError, version

import onnx
import torch

from cloudrt import __version__
from cloudrt.artifact import Artifact
from cloudrt.errors import DataError

from .ensemble import Ensemble

OPSET = 18
IR_VERSION = 10


def to_onnx(ensemble: Ensemble, precision: str) -> onnx.ModelProto:
    """Export an ensemble, of one checkpoint mostly, in `precision` ("fp32" or "fp16"); onnx's full checker looks at it.

    The fp16 graph casts to half before the network and back after it; normalisation, resizing, sigmoid and rounding
    stay in float32. The batch dimension is free and named N.
    """
    if precision not in ("fp32", "fp16"):
        raise DataError(f"precision is fp32 or fp16, found {precision!r}")
    dtype = torch.float16 if precision == "fp16" else torch.float32
    graph = ensemble.graph(dtype)
    height, width = ensemble.config.input_size
    example = torch.zeros((2, height, width, 3), dtype=torch.uint8)
    with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "onnx_ir"), torch.no_grad():
        warnings.simplefilter(
            "ignore"
        )  # the exporter warns of its own internals; the checker and the gate judge the result
        program = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["probability"],
            dynamic_shapes={"image": {0: torch.export.Dim("N", min=1)}},
            external_data=False,
            verbose=False,
        )
        assert program is not None
        model = program.model_proto
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "cloudrt", __version__
    _strip(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def describe(ensemble: Ensemble, precision: str, parity: dict[str, float]) -> Artifact:
    """Return the metadata of an artifact of this ensemble."""
    config, first = ensemble.config, ensemble.checkpoints[0]
    licenses = dict.fromkeys(one.weights_license for one in ensemble.checkpoints if one.weights_license)
    return Artifact(
        labels=config.labels,
        input_size=config.input_size,
        mean=tuple(config.mean),
        std=tuple(config.std),
        rules=ensemble.rules,
        architecture=config.architecture,
        encoder=config.encoder,
        options=dict(config.options),
        precision=precision,
        subtract_no_data=config.subtract_no_data,
        checkpoint_sha256=ensemble.digests[0],
        validation_dice=first.dice,
        parity=dict(parity),
        versions=_versions(),
        weights_license="; ".join(licenses),
        tta=ensemble.tta,
        members=ensemble.describe(),
    )


def _strip(model: onnx.ModelProto) -> None:
    """Drop what the exporter notes about its own source lines: it is large, and names folders of this machine."""
    graph = model.graph
    for item in [*graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output]:
        del item.metadata_props[:]
        item.doc_string = ""
    del model.metadata_props[:]
    del graph.metadata_props[:]
    model.doc_string = graph.doc_string = ""


def _versions() -> dict[str, str]:
    found = {"cloudrt": __version__}
    for name in ("torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "segmentation-models-pytorch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class _quiet:
    """Keep loggers silent for a while."""

    def __init__(self, *names: str) -> None:
        self.loggers = [logging.getLogger(name) for name in names]

    def __enter__(self) -> None:
        self.levels = [logger.level for logger in self.loggers]
        for logger in self.loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *exception: object) -> None:
        for logger, level in zip(self.loggers, self.levels, strict=True):
            logger.setLevel(level)
