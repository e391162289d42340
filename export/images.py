"""The images that an export looks at: some to compare on, and for int8 others to calibrate with."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloudrt.data.scenes import draw_scene
from cloudrt.errors import ImageError
from cloudrt.images.image import find_images, load_image
from cloudrt.labels import Grid

logger = logging.getLogger(__name__)

SCENES = 16
CALIBRATION_SEEDS = 1000
"""Scenes that calibrate have seeds from here on; those that are compared have seeds from 0."""


@dataclass(frozen=True)
class Compared:
    """Images at the network's input size.

    Parameters
    ----------
    source
        What they are, for the record.
    names
        One an image.
    images
        (N, H, W, 3) uint8 RGB.
    """

    source: str
    names: tuple[str, ...]
    images: NDArray[np.uint8]


def open_images(folder: Path | None, size: Grid, most: int, *, calibrate: bool = False) -> tuple[Compared, Compared]:
    """Load the images to compare and those to calibrate with; the latter are none unless `calibrate`.

    Two sets that share no image, evenly spaced over the folder, `most` in each at most; where the folder holds too few
    for two sets, comparison comes first. Made-up scenes where the folder is None.

    Raises
    ------
    ImageError
        None of the chosen images can be read.
    """
    if folder is None:
        return _scenes(0, size), _scenes(CALIBRATION_SEEDS, size if calibrate else None)
    files = find_images(folder)
    wanted = min(len(files), most * (2 if calibrate else 1))
    chosen = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, wanted).astype(int))]
    names, loaded = [], []
    for file in chosen:
        try:
            loaded.append(load_image(file.path, size))
            names.append(file.key)
        except ImageError as error:
            logger.warning("%s %s: left out", file.key, error)
    if not loaded:
        raise ImageError(f"{folder}: none of {len(chosen)} images can be read")
    step = 2 if calibrate else 1
    compared = Compared("given images", tuple(names[::step]), np.stack(loaded[::step]))
    if not calibrate:
        return compared, _scenes(0, None)
    if len(loaded) == 1:
        logger.warning("one image both calibrates and is compared: give more for a judgement that counts")
        return compared, compared
    return compared, Compared("given images", tuple(names[1::2]), np.stack(loaded[1::2]))


def _scenes(seed: int, size: Grid | None) -> Compared:
    if size is None:
        return Compared("none", (), np.zeros((0, 1, 1, 3), np.uint8))
    shape = (max(64, size[0]), max(64, size[1]))
    seeds = range(seed, seed + SCENES)
    images = np.stack([load_image(draw_scene(one, shape).image, size) for one in seeds])
    return Compared("made-up scenes", tuple(f"scene {one}" for one in seeds), images)
