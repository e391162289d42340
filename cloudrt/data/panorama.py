"""Synthetic panoramas with true masks: daily images of a part of the Earth, composed of scenes side by side.

    OUT/synthetic_20200101_-180-180_-15-15.jpg    named with day, longitudes and latitudes
    OUT/truth.csv                                 Image_Label,EncodedPixels, on the grid of the panorama's masks

A panorama has 100 pixels per degree. The height and width of its masks are a quarter of its own.
"""

from __future__ import annotations

import csv
import datetime
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.data.scenes import SyntheticScene, draw_scene
from cloudrt.data.synth import HEADER, MOST_THREADS, output_folder, write_jpeg
from cloudrt.errors import DataError
from cloudrt.labels import CLASSES, LABEL_GRID, Grid
from cloudrt.masks.rle import rle_encode
from cloudrt.system.machine import usable_cpus
from cloudrt.system.overlap import overlap

BLOCK = 4
"""Pixels of the panorama per pixel of its masks, along each axis."""
FIRST_DAY = datetime.date(2020, 1, 1)
PIXELS_PER_DEGREE = 100


def write_panoramas(
    out: Path,
    size: Grid,
    days: int = 1,
    seed: int = 0,
    *,
    scene: Grid = LABEL_GRID,
    threads: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> list[Path]:
    """Draw panoramas and write them, one per day, with their truth.

    Parameters
    ----------
    out
        A folder that does not exist, or is empty.
    size
        Height and width of a panorama in pixels, multiples of 4, at least those of a scene and at most 18000 and
        36000. A pixel covers 0.01 degrees; the centre is at longitude and latitude 0.
    days
        Number of panoramas.
    seed
        0 or more; the same arguments give the same bytes.
    scene
        Height and width of the scenes, multiples of 4; scenes at the right and lower edge are cropped.
    threads
        Number of threads; 0 uses all usable cores, up to 8.
    progress
        Called as ``progress(done, scenes)`` after each scene.

    Raises
    ------
    DataError
        Arguments out of range, `out` exists and is not empty, or the disk cannot be written.
    """
    height, width = size
    if not all(side % BLOCK == 0 and side >= least for side, least in zip(size, scene, strict=True)):
        raise DataError(
            f"a panorama must be at least {scene[1]}x{scene[0]} pixels, the size of a scene, with sides that are "
            f"multiples of {BLOCK}, found {width}x{height}"
        )
    if any(side % BLOCK for side in scene):
        raise DataError(f"the sides of a scene must be multiples of {BLOCK}, found {scene[1]}x{scene[0]}")
    if width > 360 * PIXELS_PER_DEGREE or height > 180 * PIXELS_PER_DEGREE:
        raise DataError(f"a panorama must have at most 36000x18000 pixels, found {width}x{height}")
    if days < 1 or seed < 0 or threads < 0:
        raise DataError(f"days must be at least 1, seed and threads at least 0, found {days}, {seed} and {threads}")
    corners = [(y, x) for y in range(0, height, scene[0]) for x in range(0, width, scene[1])]
    seeds = np.random.SeedSequence(seed).spawn(days * len(corners))
    threads = threads or min(usable_cpus(), MOST_THREADS)
    names = []
    with (
        output_folder(out) as folder,
        ThreadPoolExecutor(threads) as pool,
        (folder / "truth.csv").open("w", encoding="utf-8", newline="\n") as table,
    ):
        table.write(HEADER)
        writer = csv.writer(table, lineterminator="\n")
        drawn = overlap(pool, lambda one: draw_scene(one, scene), seeds, 2 * threads)
        for day in range(days):
            image = np.zeros((height, width, 3), np.uint8)
            masks = np.zeros((len(CLASSES), height // BLOCK, width // BLOCK), np.uint8)
            for number, corner in enumerate(corners, day * len(corners) + 1):
                _paste(next(drawn), corner, image, masks)
                if progress:
                    progress(number, len(seeds))
            name = _name(FIRST_DAY + datetime.timedelta(day), size)
            write_jpeg(folder / name, image)
            names.append(name)
            writer.writerows((f"{name}_{label}", rle_encode(mask)) for label, mask in zip(CLASSES, masks, strict=True))
    return [out / name for name in names]


def _name(day: datetime.date, size: Grid) -> str:
    south, west = (-side / 2 / PIXELS_PER_DEGREE for side in size)
    return f"synthetic_{day:%Y%m%d}_{west:g}-{-west:g}_{south:g}-{-south:g}.jpg"


def _paste(scene: SyntheticScene, corner: tuple[int, int], image: NDArray[np.uint8], masks: NDArray[np.uint8]) -> None:
    """Copy a scene to its place, cropped to the panorama."""
    y, x = corner
    rows, columns = scene.image.shape[:2]
    part = image[y : y + rows, x : x + columns]
    part[...] = scene.image[: part.shape[0], : part.shape[1]]
    target = masks[:, y // BLOCK : (y + rows) // BLOCK, x // BLOCK : (x + columns) // BLOCK]
    for mask, out in zip(scene.masks, target, strict=True):
        small = cv2.resize(mask, (columns // BLOCK, rows // BLOCK), interpolation=cv2.INTER_NEAREST)
        out[...] = small[: out.shape[0], : out.shape[1]]
