"""Mosaics of images segmented as panoramas, compared with the images alone and with their labels.

Part of the study of tiles: for each overlap, the agreement of the masks and the largest steps in level at the borders
of tiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.data.scenes import draw_scene
from cloudrt.geo.blend import Blend
from cloudrt.geo.tiles import Panorama, open_panorama
from cloudrt.geo.tiling import Tiling
from cloudrt.images.image import Image, ImageFile, decode, find_images
from cloudrt.inference.panoramas import predict_panoramas
from cloudrt.inference.pipeline import Segmenter
from cloudrt.labels import Grid, Labels
from cloudrt.masks.metric import dice
from cloudrt.masks.rle import rle_to_submit_grid
from cloudrt.masks.table import read_table
from cloudrt.system.progress import progress_bar

OVERLAPS = (0.0, 0.125, 0.25, 0.375, 0.5)
ROWS, COLUMNS = 4, 8
"""Rows and columns of images in a mosaic."""
ALIGNED, SEAMS = 2, 1
"""Number of mosaics that are segmented as they are, and of cropped ones whose steps are measured; each takes time."""


@dataclass
class Known:
    """An image in a mosaic: row, column, masks of the image segmented alone, and labels or None, (C, H, W) each."""

    row: int
    column: int
    alone: NDArray[np.uint8]
    truth: NDArray[np.uint8] | None


@dataclass
class MosaicAgreement:
    """Agreement of images in mosaics, for one overlap.

    Parameters
    ----------
    pieces, labels
        Dice of each (image, class) with the image segmented alone, and with the labels.
    at_borders, elsewhere
        Largest step in level at the borders of tiles, and elsewhere.
    tiles
        Number of tiles.
    """

    pieces: list[float] = field(default_factory=list)
    labels: list[float] = field(default_factory=list)
    at_borders: int = 0
    elsewhere: int = 0
    tiles: int = 0


def known_images(
    segmenter: Segmenter, images: Sequence[Image], truths: Sequence[NDArray[np.uint8] | None]
) -> list[list[Known]]:
    """Segment each image alone, and return the images of each mosaic; images that do not fill one are left out."""
    size, found = ROWS * COLUMNS, []
    results = list(segmenter.predict(list(images)))
    for begin in range(0, len(images) - size + 1, size):
        mosaic = []
        for number in range(size):
            result = results[begin + number]
            alone = np.stack([result.mask(name) for name in segmenter.labels.classes])
            mosaic.append(Known(number // COLUMNS, number % COLUMNS, alone, truths[begin + number]))
        found.append(mosaic)
    return found


def cut(grid: Grid, random: np.random.Generator | None) -> tuple[slice, slice]:
    """Return the rows and columns of a mosaic that are kept: all, or all but a random part of an image on each side."""
    kept = []
    for side, count in zip(grid, (ROWS, COLUMNS), strict=True):
        first, last = (0, 0) if random is None else random.uniform(0.15, 0.85, 2) * side
        kept.append(slice(int(first), count * side - int(last)))
    return kept[0], kept[1]


def blended(segmenter: Segmenter, panorama: Panorama, overlap: float) -> NDArray[np.uint8]:
    """Return the levels of a panorama, (C, W, H), without presence and gate."""
    grid, labels = panorama.place.grid, segmenter.labels
    blend = Blend(grid, labels.submit_grid, len(labels.classes), overlap, panorama.beyond)
    for tile, inferred in zip(
        panorama.tiles, segmenter.infer([panorama.cut(tile) for tile in panorama.tiles]), strict=True
    ):
        assert inferred.probability is not None
        blend.add(inferred.probability, tile.grid_x, tile.grid_y)
    return blend.finish()


def largest_steps(levels: NDArray[np.uint8], borders: set[int]) -> tuple[int, int]:
    """Return the largest step from one column to the next across the borders of tiles, and elsewhere."""
    steps = np.abs(np.diff(levels.astype(np.int16), axis=1)).max(axis=(0, 2))
    inside = [step for column, step in enumerate(steps, 1) if column not in borders]
    return max(int(steps[column - 1]) for column in borders), int(max(inside))


def compare(
    segmenter: Segmenter, images: Sequence[Image], known: Sequence[Sequence[Known]], *, cropped: bool
) -> list[MosaicAgreement]:
    """Segment the mosaics with each overlap, and compare each whole image."""
    labels, random = segmenter.labels, np.random.default_rng(0)
    height, width = labels.submit_grid
    found = [MosaicAgreement() for _ in OVERLAPS]
    with TemporaryDirectory() as folder, progress_bar("Mosaics", len(known) * len(OVERLAPS)) as advance:
        for number, mosaic in enumerate(known):
            some = images[number * ROWS * COLUMNS :][: ROWS * COLUMNS]
            lines = [np.hstack(some[row * COLUMNS : (row + 1) * COLUMNS]) for row in range(ROWS)]
            rows, columns = cut((height, width), random if cropped else None)
            picture = np.vstack(lines)[rows, columns]
            path = write_mosaic(Path(folder), picture, segmenter.artifact.field_of_view[1] // width)
            for overlap, agreement in zip(OVERLAPS, found, strict=True):
                tiling = Tiling(overlap)
                (result,) = predict_panoramas(segmenter, [ImageFile(path.name, path)], tiling)
                assert result.error is None, result.error
                whole = np.stack([result.mask(name) for name in labels.classes])
                for one in mosaic:
                    y, x = one.row * height - rows.start, one.column * width - columns.start
                    part = whole[:, max(y, 0) : y + height, max(x, 0) : x + width]
                    if min(y, x) < 0 or part.shape[1:] != (height, width):
                        continue
                    agreement.pieces += [dice(a, b) for a, b in zip(part, one.alone, strict=True)]
                    if one.truth is not None:
                        agreement.labels += [dice(a, b) for a, b in zip(part, one.truth, strict=True)]
                panorama = open_panorama(path, segmenter.artifact, tiling, 10**9)
                agreement.tiles += len(panorama.tiles)
                starts = {tile.grid_x for tile in panorama.tiles}
                borders = {at for start in starts for at in (start, start + width) if 0 < at < whole.shape[2]}
                # Steps at the edges of images come from the images, not from the tiles.
                borders -= {column * width - columns.start for column in range(COLUMNS + 1)}
                if borders and cropped and number < SEAMS:
                    at, elsewhere = largest_steps(blended(segmenter, panorama, overlap), borders)
                    agreement.at_borders = max(agreement.at_borders, at)
                    agreement.elsewhere = max(agreement.elsewhere, elsewhere)
                advance()
    return found


def write_mosaic(folder: Path, picture: Image, times: int) -> Path:
    """Write a mosaic whose name states a position with 100 / `times` pixels per degree."""
    height, width = (side * times / 100 for side in picture.shape[:2])
    path = folder / f"mosaic_0-{width:g}_0-{height:g}.png"
    if not cv2.imwrite(str(path), picture[..., ::-1]):
        raise OSError(f"{path} cannot be written")
    return path


def read_truth(path: Path, keys: Iterable[str], labels: Labels) -> list[NDArray[np.uint8] | None]:
    """Return the masks of images on the submission grid, (C, H, W)."""
    table = read_table(path, labels)
    return [
        np.stack([rle_to_submit_grid(table.get((key, name), ""), labels) for name in labels.classes]) for key in keys
    ]


def measure_agreement(segmenter: Segmenter, folder: Path, truth: Path, scenes: int) -> dict[str, Any]:
    """Return the mean Dice of mosaics of labelled images and of scenes, for each overlap."""
    labels = segmenter.labels
    files = find_images(folder)
    real = [decode(file.path.read_bytes()) for file in files]
    truths = read_truth(truth, [file.key for file in files], labels)
    drawn = [draw_scene(seed, labels.submit_grid).image for seed in range(scenes)]
    found: dict[str, Any] = {}
    for name, images, masks_of in (("real", real, truths), ("synthetic", drawn, [None] * len(drawn))):
        known = known_images(segmenter, images, masks_of)
        every = [one for mosaic in known for one in mosaic]
        alone = [
            dice(a, b) for one in every if one.truth is not None for a, b in zip(one.alone, one.truth, strict=True)
        ]
        found[name] = {"images": len(every), "mosaics": len(known)}
        if alone:
            found[name]["labels_alone"] = float(np.mean(alone))
        for how in ("aligned", "cropped"):
            rows = []
            some = known if how == "cropped" else known[:ALIGNED]
            for overlap, one in zip(OVERLAPS, compare(segmenter, images, some, cropped=how == "cropped"), strict=True):
                row = {"overlap": overlap, "tiles": one.tiles, "images": len(one.pieces) // len(labels.classes)}
                row |= {"pieces": float(np.mean(one.pieces))}
                row |= {"labels": float(np.mean(one.labels))} if one.labels else {}
                row |= {"step_at_borders": one.at_borders, "step_elsewhere": one.elsewhere} if one.elsewhere else {}
                rows.append(row)
            found[name][how] = rows
    return found
