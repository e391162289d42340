"""Convert a checkpoint, compare the result with PyTorch, and write the artifact only if it is within the tolerances.

ExportSource -> convert to a precision -> gate -> write
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import onnx

from cloudrt.engines.base import BATCH_SIZES
from cloudrt.engines.choice import int8_problem
from cloudrt.engines.tensorrt_check import TensorrtCheck, check, is_installed
from cloudrt.errors import ArtifactError, DataError
from cloudrt.model.artifact import Artifact
from cloudrt.model.onnx_file import artifact_bytes
from cloudrt.model.parity import TOLERANCES, Parity, Tolerances
from cloudrt.system.files import replacing

from .gate import Gate, choose_gate_provider, lower
from .graph import describe, finish
from .half import to_half
from .images import SCENES
from .int8 import TARGETS, Quantiser
from .layers import layers_of
from .source import ExportSource
from .speed import measure_speed

logger = logging.getLogger(__name__)

PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class Target:
    """The artifact to make, and how it is compared with PyTorch.

    Parameters
    ----------
    precision
        "fp32", "fp16" or "int8".
    int8_target
        Runtime that int8 layers are quantised for, "cpu" or "tensorrt".
    provider
        Provider that runs the artifact for the comparison; for "auto", see `choose_gate_provider`.
    tolerances
        Limits of the gate. None takes those of the precision.
    batch_size
        Batch size of the engines that TensorRT builds for the gate and for `check`; 0 takes the provider's default.
    check
        GPU generations to build TensorRT engines for, of `cloudrt.engines.tensorrt_check.TARGETS`. Without any,
        TensorRT only parses the artifact.

    Raises
    ------
    DataError
        Unknown precision or int8 target.
    """

    precision: str = "fp16"
    int8_target: str = "cpu"
    provider: str = "auto"
    tolerances: Tolerances | None = None
    batch_size: int = 0
    check: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise DataError(f"precision must be one of {', '.join(PRECISIONS)}, found {self.precision!r}")
        if self.int8_target not in TARGETS:
            raise DataError(f"the int8 target must be one of {', '.join(TARGETS)}, found {self.int8_target!r}")

    @property
    def limits(self) -> Tolerances:
        """The limits of the gate."""
        return self.tolerances or TOLERANCES[self.precision]

    @property
    def layout(self) -> str:
        """The int8 target of the artifact; empty for other precisions."""
        return self.int8_target if self.precision == "int8" else ""

    def gate_provider(self) -> str:
        """Return the provider that runs the gate.

        Raises
        ------
        ProviderError
            The provider cannot run here, or has no int8 kernels for the artifact's int8 layers.
        """
        return choose_gate_provider(Artifact(precision=self.precision, int8_target=self.layout), self.provider)


@dataclass(frozen=True)
class Exported:
    """An artifact that was written.

    Parameters
    ----------
    path, artifact, bytes
        The file, its metadata and its size.
    parity, tolerances
        The measured differences and the limits.
    networks_per_image
        Number of network runs per image.
    layers
        Number of layers that could be lowered; those that were not are in `artifact.kept_fp32`.
    speed
        Speed relative to the same network in fp32, in the gate's provider on this machine. None in fp32, and where the
        provider computes in another precision or would build another engine.
    tensorrt
        Result of TensorRT's parser and builder, or the reason why they refuse the artifact; None if TensorRT for RTX is
        not installed.
    """

    path: Path
    artifact: Artifact
    parity: Parity
    tolerances: Tolerances
    bytes: int
    networks_per_image: int
    layers: int
    speed: float | None = None
    tensorrt: TensorrtCheck | str | None = None


def export(
    source: ExportSource, output: Path, target: Target | None = None, advance: Callable[[int], object] | None = None
) -> Exported:
    """Write an artifact if its differences from PyTorch in fp32 are within the tolerances.

    Parameters
    ----------
    source
        Checkpoints, images and PyTorch's outputs.
    output
        Path of the artifact.
    target
        What to make; fp16 by default.
    advance
        Called with the number of images compared since the last call.

    Raises
    ------
    ParityError
        The artifact, or the fp32 graph that it is converted from, exceeds its tolerances; nothing is written.
    ProviderError
        The provider cannot run here, or has no int8 kernels for the artifact's int8 layers.
    DataError
        `output` is one of the checkpoints.
    """
    target = target or Target()
    provider = target.gate_provider()
    if os.path.realpath(output) in source.files:
        raise DataError(f"{output} is the checkpoint itself: give another output")
    metadata = describe(source.ensemble, target.precision, int8_target=target.layout)
    gate = Gate(source.reference, target.limits, metadata, provider, target.batch_size)
    if target.precision != "fp32":
        source.fp32_gate().check(source.model)
    layers, convert = _conversion(source, target)
    model, parity, kept = lower(gate, layers, convert, advance)
    artifact = describe(source.ensemble, target.precision, parity.to_dict(), kept, target.layout)
    finished = finish(model, artifact)
    with replacing(output) as partial:
        partial.write_bytes(artifact_bytes(finished))
    speed = None
    # On a CPU an fp16 artifact runs in fp32: nothing to compare.
    lowered = target.precision == "int8" or (target.precision == "fp16" and provider != "cpu")
    if lowered and int8_problem(provider, artifact) is None and not gate.builds:
        baseline = finish(source.model, describe(source.ensemble, "fp32"))
        speed = measure_speed(finished, baseline, provider, source.compared.images)
    return Exported(
        path=output,
        artifact=artifact,
        parity=parity,
        tolerances=gate.limits,
        bytes=output.stat().st_size,
        networks_per_image=source.ensemble.networks_per_image,
        layers=len(layers),
        speed=speed,
        tensorrt=check_tensorrt(finished, artifact, target),
    )


def check_tensorrt(model: onnx.ModelProto, artifact: Artifact, target: Target) -> TensorrtCheck | str | None:
    """Parse an artifact with TensorRT and build engines for `target.check`; return the result, or why there is none.

    None means that TensorRT for RTX is not installed.
    """
    reason = int8_problem("tensorrt", artifact)
    if reason or not is_installed():
        return reason
    try:
        return check(model, artifact, target.batch_size or BATCH_SIZES["tensorrt"], target.check)
    except ArtifactError as error:
        return str(error)


def _conversion(source: ExportSource, target: Target) -> tuple[list[str], Callable[[Collection[str]], onnx.ModelProto]]:
    """Return the layers that can be lowered, and the conversion: layers kept in fp32 -> model."""
    if target.precision == "fp32":
        return [], lambda _kept: source.model
    if target.precision == "fp16":
        return layers_of(source.model), lambda kept: to_half(source.model, kept)
    if source.calibration.source == SCENES:
        logger.warning("int8 is calibrated on synthetic images: give --data FOLDER with images like yours")
    quantiser = Quantiser(source.model, source.calibration.images, target.layout)
    return quantiser.layers, quantiser.quantise
