"""Export a checkpoint: convert, compare with PyTorch, and write the artifact only if it gives the same submission.

Source (checkpoints, images, the traced graph, PyTorch's answers) -> convert to a precision -> gate -> write
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import onnx

from cloudrt.engines.choice import emulation
from cloudrt.errors import DataError
from cloudrt.labels import Grid
from cloudrt.model.artifact import Artifact
from cloudrt.model.network import Checkpoint
from cloudrt.model.parity import TOLERANCES, Parity, Tolerances
from cloudrt.system.files import replacing, sha256

from .ensemble import Ensemble
from .gate import Gate, choose_gate_provider, lower
from .graph import describe, finish, simplify, trace
from .half import to_half
from .images import open_images
from .int8 import TARGETS, Quantiser
from .layers import layers_of
from .parity import Reference
from .speed import measure_speed

logger = logging.getLogger(__name__)

PRECISIONS = ("fp32", "fp16", "int8")
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Exported:
    """The artifact that was written, and the figures that it passed with.

    Parameters
    ----------
    path, artifact, bytes
        The file, what it says of itself, its size.
    parity, tolerances
        What was measured, and what was allowed.
    networks_per_image
        How often a network runs for one image.
    layers
        How many layers could be lowered; those that were not are in `artifact.kept_fp32`.
    speed
        Times the speed of the same network in fp32, in the provider of the gate, on this machine; None where it was
        not measured, because the provider emulates.
    """

    path: Path
    artifact: Artifact
    parity: Parity
    tolerances: Tolerances
    bytes: int
    networks_per_image: int
    layers: int
    speed: float | None = None


class Source:
    """What every precision of an export starts from, made once.

    Parameters
    ----------
    checkpoints
        best.pth of a training run, or of several.
    tta
        Test-time augmentation inside the graph: the mean over flips, "none", "h", "v" or "hv".
    input_size
        Height and width of the images that enter, multiples of 32; the checkpoint's unless given.
    calibration
        A folder of images to compare on, and to calibrate int8 with; made-up scenes where it is None.
    images
        At most so many of them to compare, evenly spaced, and as many others to calibrate with.
    int8
        Whether images are set aside to calibrate with.
    weights_license
        Stored in the artifact; the checkpoint's unless given.

    Raises
    ------
    ArtifactError
        Not a checkpoint.
    DataError
        An input size that is no multiple of 32, or that the network cannot be exported at; checkpoints that do not go
        together.
    ImageError
        No image can be read.
    """

    def __init__(
        self,
        checkpoints: Path | Sequence[Path],
        *,
        tta: str = "none",
        input_size: Grid | None = None,
        calibration: Path | None = None,
        images: int = 64,
        int8: bool = False,
        weights_license: str = "",
    ) -> None:
        paths = [checkpoints] if isinstance(checkpoints, Path) else list(checkpoints)
        self.files = {os.path.realpath(path) for path in paths}
        members = [Checkpoint.load(path) for path in paths]
        if weights_license:
            members = [replace(member, weights_license=weights_license) for member in members]
        if input_size is not None:
            members = [replace(one, config=replace(one.config, input_size=input_size)) for one in members]
        self.ensemble = Ensemble(tuple(members), tuple(sha256(path) for path in paths), tta)
        self.compared, self.calibration = open_images(
            calibration, self.ensemble.config.input_size, images, calibrate=int8
        )
        self.model = trace(self.ensemble)

    @cached_property
    def reference(self) -> Reference:
        """What PyTorch says of the images: computed when first asked for, or by `run_pytorch`."""
        return self.run_pytorch()

    def run_pytorch(self, advance: Progress | None = None) -> Reference:
        """Run PyTorch over the images, and simplify the graph; `advance` is called with the number of images done."""
        self.reference = Reference(self.ensemble, self.compared, advance)
        slim = simplify(self.model)
        if slim is not self.model:
            self.model = self._better(slim)
        return self.reference

    def _better(self, slim: onnx.ModelProto) -> onnx.ModelProto:
        """Return the simplified graph if it passes the gate, else the one that was traced."""
        gate = self.fp32_gate()
        parity = gate.measure(slim, give_up=True)
        if parity is None or parity.faults(gate.tolerances):
            logger.warning("the graph that onnxslim simplified does not pass the gate: it stays as traced")
            return self.model
        logger.info("onnxslim left out %d nodes", len(self.model.graph.node) - len(slim.graph.node))
        return slim

    def fp32_gate(self) -> Gate:
        """Return the gate of the graph before it is lowered: a wrong one must not hide behind int8's tolerances."""
        return Gate(self.reference, TOLERANCES["fp32"], describe(self.ensemble, "fp32"), "cpu")


def export(
    source: Source,
    output: Path,
    precision: str = "fp16",
    *,
    tolerances: Tolerances | None = None,
    provider: str = "auto",
    int8_target: str = "cpu",
    advance: Progress | None = None,
) -> Exported:
    """Write the artifact of a source if it gives the same submission as PyTorch in fp32.

    Parameters
    ----------
    source
        Checkpoints, images, and PyTorch's answers.
    output
        The artifact's path.
    precision
        Of `PRECISIONS`.
    tolerances
        Those of the precision unless given.
    provider
        Runs the artifact beside PyTorch: the one that will run it later. `auto` takes the fastest that works here.
    int8_target
        What int8 layers are laid out for, "cpu" or "tensorrt".
    advance
        Called with the number of images compared since the last call.

    Raises
    ------
    ParityError
        Past the tolerances; nothing is written.
    ProviderError
        The provider cannot run here, or would only emulate the artifact.
    """
    judge = judge_of(precision, int8_target, provider)
    if os.path.realpath(output) in source.files:
        raise DataError(f"{output} is the checkpoint itself: give another output")
    target = int8_target if precision == "int8" else ""
    gate = Gate(
        source.reference,
        tolerances or TOLERANCES[precision],
        describe(source.ensemble, precision, int8_target=target),
        judge,
    )
    if precision != "fp32":
        source.fp32_gate().check(source.model)
    layers, convert = _conversion(source, precision, target)
    model, parity, kept = lower(gate, layers, convert, advance)
    artifact = describe(source.ensemble, precision, parity.to_dict(), kept, target)
    finished = finish(model, artifact)
    with replacing(output) as partial:
        partial.write_bytes(finished.SerializeToString())
    speed = None
    # On a CPU a fp16 artifact runs as fp32: there is nothing to compare.
    if emulation(judge, artifact) is None and (precision == "int8" or (precision == "fp16" and judge != "cpu")):
        baseline = finish(source.model, describe(source.ensemble, "fp32"))
        speed = measure_speed(finished, baseline, judge, source.compared.images)
    networks = source.ensemble.networks_per_image
    return Exported(output, artifact, parity, gate.tolerances, output.stat().st_size, networks, len(layers), speed)


def judge_of(precision: str, int8_target: str = "cpu", provider: str = "auto") -> str:
    """Return the provider that judges a precision; see `export` for the parameters and errors."""
    if precision not in PRECISIONS:
        raise DataError(f"precision is one of {', '.join(PRECISIONS)}, found {precision!r}")
    if int8_target not in TARGETS:
        raise DataError(f"the int8 target is one of {', '.join(TARGETS)}, found {int8_target!r}")
    said = Artifact(precision=precision, int8_target=int8_target if precision == "int8" else "")
    return choose_gate_provider(said, provider)


def _conversion(
    source: Source, precision: str, target: str
) -> tuple[list[str], Callable[[Collection[str]], onnx.ModelProto]]:
    """Return the layers that can be lowered, and the conversion: layers that stay in fp32 -> the model."""
    if precision == "fp32":
        return [], lambda _kept: source.model
    if precision == "fp16":
        return layers_of(source.model), lambda kept: to_half(source.model, kept)
    if source.calibration.source == "made-up scenes":
        logger.warning("int8 ranges are measured on made-up scenes: give --calibration DIR with images like yours")
    quantiser = Quantiser(source.model, source.calibration.images, target)
    return quantiser.layers, quantiser.quantise
