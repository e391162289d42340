"""The inputs that all precisions of an export share: checkpoints, images, the traced graph and PyTorch's results."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import onnx

from cloudrt.labels import Grid
from cloudrt.model.checkpoint import Checkpoint
from cloudrt.model.parity import TOLERANCES
from cloudrt.system.files import sha256

from .ensemble import Ensemble
from .gate import Gate
from .graph import describe, simplify, trace
from .images import open_images
from .parity import Reference

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceOptions:
    """How the graph is built, and which images it is compared on.

    Parameters
    ----------
    tta
        Test-time augmentation inside the graph, the mean of the logits over flips: "none", "h", "v" or "hv".
    input_size
        Height and width of the input images, multiples of 32. None takes the checkpoint's.
    data
        Folder of images for the parity gate and for int8 calibration. None uses synthetic images.
    max_images
        Maximum number of images to compare, and of other images to calibrate with, evenly spaced over the folder. This
        many of each are drawn if they are synthetic.
    calibrate
        Whether to set images aside for int8 calibration.
    weights_license
        Licence stored in the artifact. Empty takes the checkpoint's.
    """

    tta: str = "none"
    input_size: Grid | None = None
    data: Path | None = None
    max_images: int = 64
    calibrate: bool = False
    weights_license: str = ""


class ExportSource:
    """Checkpoints, images and the traced graph, prepared once for all precisions.

    Parameters
    ----------
    checkpoints
        best.pth of one or more training runs.
    options
        See `SourceOptions`.

    Raises
    ------
    ArtifactError
        A file is not a checkpoint.
    DataError
        The input size is not a multiple of 32 or cannot be exported, the checkpoints do not match, or the folder of
        images is missing, cannot be listed or has no images.
    ImageError
        No image can be read.
    """

    def __init__(self, checkpoints: Path | Sequence[Path], options: SourceOptions | None = None) -> None:
        options = options or SourceOptions()
        paths = [checkpoints] if isinstance(checkpoints, Path) else list(checkpoints)
        self.files = {os.path.realpath(path) for path in paths}
        members = [Checkpoint.load(path) for path in paths]
        if options.weights_license:
            members = [replace(member, weights_license=options.weights_license) for member in members]
        if options.input_size is not None:
            members = [replace(one, config=replace(one.config, input_size=options.input_size)) for one in members]
        self.ensemble = Ensemble(tuple(members), tuple(sha256(path) for path in paths), options.tta)
        self.compared, self.calibration = open_images(
            options.data, self.ensemble.config.input_size, options.max_images, calibrate=options.calibrate
        )
        self.model = trace(self.ensemble)

    @cached_property
    def reference(self) -> Reference:
        """PyTorch's outputs, computed by `run_pytorch` or on first access."""
        return self.run_pytorch()

    def run_pytorch(self, advance: Callable[[int], object] | None = None) -> Reference:
        """Run PyTorch over the images and simplify the graph."""
        self.reference = Reference(self.ensemble, self.compared, advance)
        slim = simplify(self.model)
        if slim is not self.model:
            self.model = self._better(slim)
        return self.reference

    def _better(self, slim: onnx.ModelProto) -> onnx.ModelProto:
        """Return the simplified graph if it passes the gate, else the traced one."""
        gate = self.fp32_gate()
        parity = gate.measure(slim, give_up=True)
        if parity is None or parity.faults(gate.limits):
            logger.warning("the graph simplified by onnxslim does not pass the gate: using the graph as traced")
            return self.model
        logger.info("onnxslim removed %d nodes", len(self.model.graph.node) - len(slim.graph.node))
        return slim

    def fp32_gate(self) -> Gate:
        """Return the gate of the graph before it is lowered.

        Every precision passes it first: int8's wider tolerances would hide a wrong graph.
        """
        return Gate(self.reference, TOLERANCES["fp32"], describe(self.ensemble, "fp32"), "cpu")
