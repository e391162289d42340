"""The images of an export: some to compare on and, for int8, others to calibrate with."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloudrt.data.scenes import draw_image
from cloudrt.errors import ImageError
from cloudrt.images.image import find_images, load_image
from cloudrt.labels import Grid

logger = logging.getLogger(__name__)

GIVEN, SCENES = "given images", "synthetic images"
"""Values of `ImageSet.source`."""


@dataclass(frozen=True)
class ImageSet:
    """Images at the network's input size.

    Parameters
    ----------
    source
        `GIVEN`, `SCENES` or "none".
    names
        One per image.
    images
        (N, H, W, 3) uint8 RGB.
    """

    source: str
    names: tuple[str, ...]
    images: NDArray[np.uint8]


def open_images(
    folder: Path | None, size: Grid, max_images: int, *, calibrate: bool = False
) -> tuple[ImageSet, ImageSet]:
    """Load the images to compare on and those to calibrate with.

    The two sets are evenly spaced over the folder and disjoint, with at most `max_images` each. If the folder holds too
    few images for both, each gets half; a single image is in both.

    Parameters
    ----------
    folder
        Folder of images; None uses synthetic images.
    size
        Height and width of the network's input.
    max_images
        Maximum number of images in each set; a set of synthetic images has exactly this many.
    calibrate
        Whether images for calibration are needed; the second set is empty otherwise.

    Raises
    ------
    DataError
        `folder` is missing, cannot be listed, or has no images.
    ImageError
        None of the chosen images can be read.
    """
    if folder is None:
        compared = _scenes(range(max_images), size)
        return compared, _scenes(range(max_images, 2 * max_images), size) if calibrate else _empty()
    files = find_images(folder)
    wanted = min(len(files), max_images * (2 if calibrate else 1))
    chosen = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, wanted).astype(int))]
    names, loaded = [], []
    for file in chosen:
        try:
            loaded.append(load_image(file.path, size))
            names.append(file.key)
        except ImageError as error:
            logger.warning("%s %s: skipped", file.key, error)
    if not loaded:
        raise ImageError(f"{folder}: none of {len(chosen)} images can be read")
    if not calibrate:
        return ImageSet(GIVEN, tuple(names), np.stack(loaded)), _empty()
    compared = ImageSet(GIVEN, tuple(names[::2]), np.stack(loaded[::2]))
    if len(loaded) == 1:
        logger.warning("the same image is used for calibration and for the comparison: give more images")
        return compared, compared
    return compared, ImageSet(GIVEN, tuple(names[1::2]), np.stack(loaded[1::2]))


def _scenes(seeds: range, size: Grid) -> ImageSet:
    images = np.stack([draw_image(seed, size) for seed in seeds])
    return ImageSet(SCENES, tuple(f"scene {seed}" for seed in seeds), images)


def _empty() -> ImageSet:
    return ImageSet("none", (), np.zeros((0, 1, 1, 3), np.uint8))
