"""Export a checkpoint: convert, compare with PyTorch, and write the artifact only if it gives the same submission."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloudrt.artifact import Artifact, write_metadata
from cloudrt.engines import open_engine
from cloudrt.errors import ImageError, ParityError
from cloudrt.files import replacing, sha256
from cloudrt.images import find_images, load_image
from cloudrt.labels import Grid
from cloudrt.network import Checkpoint
from cloudrt.scenes import draw_scene

from .ensemble import Ensemble
from .graph import describe, to_onnx
from .parity import TOLERANCES, Parity, Tolerances, measure_parity

logger = logging.getLogger(__name__)

SCENES = 16


@dataclass(frozen=True)
class Exported:
    """The artifact that was written, and the figures that it passed with."""

    path: Path
    artifact: Artifact
    parity: Parity
    tolerances: Tolerances
    bytes: int
    networks_per_image: int


def export(
    checkpoints: Path | Sequence[Path],
    output: Path,
    precision: str = "fp16",
    *,
    tta: str = "none",
    calibration: Path | None = None,
    images: int = 64,
    tolerances: Tolerances | None = None,
    weights_license: str = "",
    advance: Callable[[int], object] | None = None,
) -> Exported:
    """Write the artifact of a checkpoint, or of the mean of several.

    It is gated on parity with the same in PyTorch, in ONNX Runtime on the CPU.

    Parameters
    ----------
    checkpoints
        best.pth of a training run, or of several.
    output
        The artifact's path.
    precision
        "fp16" or "fp32".
    tta
        Test-time augmentation inside the graph: the mean over flips, "none", "h", "v" or "hv".
    calibration
        A folder of images to compare on; made-up scenes where it is None.
    images
        At most so many of them, evenly spaced.
    tolerances
        Those of the precision unless given.
    weights_license
        Stored in the artifact; the checkpoint's unless given.
    advance
        Called with the number of images compared since the last call.

    Raises
    ------
    ArtifactError
        Not a checkpoint.
    ParityError
        Past the tolerances; nothing is written.
    """
    paths = [checkpoints] if isinstance(checkpoints, Path) else list(checkpoints)
    members = [Checkpoint.load(path) for path in paths]
    if weights_license:
        members = [replace(member, weights_license=weights_license) for member in members]
    ensemble = Ensemble(tuple(members), tuple(sha256(path) for path in paths), tta)
    allowed = tolerances or TOLERANCES[precision]
    source, compared = _images(calibration, ensemble.config.input_size, images)
    model = to_onnx(ensemble, precision)
    write_metadata(model, describe(ensemble, precision, {}))
    with open_engine(model, provider="cpu", batch_size=None, keep_precision=True) as engine:
        parity = measure_parity(ensemble, engine.probability, compared, source, advance=advance)
    faults = parity.faults(allowed)
    if faults:
        worst = f"; worst images: {', '.join(parity.worst)}" if parity.worst else ""
        raise ParityError(
            f"{precision} would change the submission: {'; '.join(faults)}{worst}. Nothing was written; "
            f"try {'--precision fp32' if precision == 'fp16' else 'wider tolerances'}"
        )
    artifact = describe(ensemble, precision, parity.to_dict())
    write_metadata(model, artifact)
    with replacing(output) as partial:
        partial.write_bytes(model.SerializeToString())
    return Exported(output, artifact, parity, allowed, output.stat().st_size, ensemble.networks_per_image)


def _images(folder: Path | None, size: Grid, most: int) -> tuple[str, list[tuple[str, NDArray[np.uint8]]]]:
    """Return what the images are, and (name, image at the input size) of each that can be read."""
    if folder is None:
        height, width = size
        drawn = [(f"scene {seed}", draw_scene(seed, (max(64, height), max(64, width))).image) for seed in range(SCENES)]
        return "made-up scenes", [(name, load_image(image, size)) for name, image in drawn]
    files = find_images(folder)
    chosen = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, most).astype(int))]
    loaded = []
    for file in chosen:
        try:
            loaded.append((file.key, load_image(file.path, size)))
        except ImageError as error:
            logger.warning("%s %s: left out", file.key, error)
    if not loaded:
        raise ImageError(f"{folder}: none of {len(chosen)} images can be read")
    return "given images", loaded
