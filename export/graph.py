"""Convert a checkpoint to an ONNX model: one graph, uint8 image in, uint8 probability out.

trace -> float32 graph with the exporter's metadata on each node -> simplify -> half.py or int8.py -> finish
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import torch

from cloudrt.errors import DataError
from cloudrt.model.artifact import Artifact, write_metadata
from cloudrt.system.versions import VERSION, package_versions

from .ensemble import Ensemble
from .layers import copy_metadata_props, strip_metadata_props

logger = logging.getLogger(__name__)

OPSET = 18
IR_VERSION = 10
VERSIONED = ("torch", "onnx", "onnxscript", "onnxslim", "onnxruntime-gpu", "onnxruntime", "segmentation-models-pytorch")


def trace(ensemble: Ensemble) -> onnx.ModelProto:
    """Return the float32 graph of an ensemble, with the exporter's metadata on every node; see `layers.py`.

    The batch dimension is dynamic and named N.

    Raises
    ------
    DataError
        PyTorch's exporter cannot convert the network at this input size.
    """
    graph = ensemble.graph()
    logger.info("tracing the network: takes seconds, up to a minute for a deep one")
    height, width = ensemble.config.input_size
    example = torch.zeros((2, height, width, 3), dtype=torch.uint8)
    with quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                graph,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["image"],
                output_names=["probability"] + (["presence"] if ensemble.config.presence != "none" else []),
                dynamic_shapes={"image": {0: torch.export.Dim("N", min=1)}},
                external_data=False,
                verbose=False,
            )
        except (torch.onnx.errors.OnnxExporterError, AssertionError, RuntimeError, ValueError) as error:
            cause = error.__cause__ or error
            reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
            raise DataError(
                f"{ensemble.config.architecture} with {ensemble.config.encoder} cannot be exported at "
                f"{width}x{height}: {reason.strip()}"
            ) from error
    assert program is not None
    model = program.model_proto
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "cloudrt", VERSION
    return model


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a traced model simplified by onnxslim, or the model itself if onnxslim removes no node or fails."""
    import onnxslim

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    try:
        with quiet():
            slim = onnxslim.slim(copy)
    except Exception as error:  # noqa: BLE001 - simplification is optional
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        logger.warning("onnxslim failed, using the graph as traced: %s", reason)
        return model
    if not isinstance(slim, onnx.ModelProto) or len(slim.graph.node) >= len(model.graph.node):
        return model
    slim.ir_version = IR_VERSION
    copy_metadata_props(model, slim)
    return slim


def finish(model: onnx.ModelProto, artifact: Artifact) -> onnx.ModelProto:
    """Return a checked copy without the exporter's metadata and with the artifact's metadata."""
    finished = onnx.ModelProto()
    finished.CopyFrom(model)
    strip_metadata_props(finished)
    finished.ir_version = IR_VERSION
    finished.producer_name, finished.producer_version = "cloudrt", VERSION
    onnx.checker.check_model(finished, full_check=True)
    write_metadata(finished, artifact)
    return finished


def describe(
    ensemble: Ensemble,
    precision: str,
    parity: dict[str, float] | None = None,
    kept_fp32: tuple[str, ...] = (),
    int8_target: str = "",
) -> Artifact:
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
        subtract_no_data=all(one.config.subtract_no_data for one in ensemble.checkpoints),
        checkpoint_sha256=ensemble.digests[0],
        validation_dice=first.dice,
        parity=dict(parity or {}),
        kept_fp32=kept_fp32,
        int8_target=int8_target,
        versions={"cloudrt": VERSION} | package_versions(*VERSIONED),
        weights_license="; ".join(licenses),
        tta=ensemble.tta,
        members=ensemble.describe(),
        field_of_view=config.labels.label_grid,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings of exporters and quantisers about their internals: checker and gate verify the result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
