"""Resizing of images: area averages and bilinear interpolation, and the reduction of libjpeg-turbo's scaled decode."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.labels import Grid

_BAND = 4096
"""Longest side of the parts in which `reduce` computes, in pixels; a multiple of 8."""


def resize(image: NDArray[np.uint8], size: Grid, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Resize an (H, W, 3) uint8 image to `size` (height, width): area averages to shrink, bilinear to enlarge.

    Each axis is treated by itself, so one can shrink and the other grow. The result is written to `out` if it is
    given. Otherwise it is a new array, or `image` itself if that has the size and is C-contiguous.
    """
    height, width = size
    image = np.ascontiguousarray(image)
    # Two steps if one side shrinks and the other grows: OpenCV computes area averages only if neither grows.
    smaller = min(height, image.shape[0]), min(width, image.shape[1])
    for (rows, columns), method in ((smaller, cv2.INTER_AREA), (size, cv2.INTER_LINEAR)):
        if image.shape[:2] != (rows, columns):
            target = out if (rows, columns) == size else None
            image = np.asarray(cv2.resize(image, (columns, rows), dst=target, interpolation=method), np.uint8)
    if out is None or image is out:
        return image
    out[...] = image
    return out


def scale_that_covers(size: Grid, cover: Grid) -> int:
    """Return the smallest n from 1 to 8 such that n/8 of `size`, rounded up, is at least `cover`; 8 if none is."""
    for eighths in range(1, 8):
        if all(-(-side * eighths // 8) >= wanted for side, wanted in zip(size, cover, strict=True)):
            return eighths
    return 8


def reduce(image: NDArray[np.uint8], cover: Grid) -> NDArray[np.uint8]:
    """Shrink an image like libjpeg-turbo when it decodes a JPEG of the same pixels at a smaller scale.

    Parameters
    ----------
    image
        (H, W, 3) uint8.
    cover
        The result has the smallest size of 1/8, 2/8, ... of the image, rounded up, whose height and width are at least
        these.
    """
    sides = image.shape[:2]
    eighths = scale_that_covers((sides[0], sides[1]), cover)
    if eighths == 8:
        return image
    rows, columns = (-(-side * eighths // 8) for side in sides)
    below, right = (-side % 8 for side in sides)
    if below or right:
        image = np.asarray(cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REPLICATE), np.uint8)
    if 8 % eighths == 0:  # jidctred.c: averages of the pixels of a block
        size = image.shape[1] * eighths // 8, image.shape[0] * eighths // 8
        return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)[:rows, :columns]
    return _shrink(image, eighths)[:rows, :columns]


def reduction_weights(length: int, eighths: int) -> NDArray[np.float32]:
    """Return the matrix by which `reduce` multiplies an axis of `length` pixels.

    It is (`length * eighths / 8` rounded up, `length`), for 1 to 7 eighths. The last block is completed with copies of
    the last pixel.
    """
    block = _reduction(eighths)
    if 8 % eighths == 0:
        block = np.kron(np.eye(eighths), np.full((1, 8 // eighths), eighths / 8)).astype(np.float32)
    weights = np.kron(np.eye(-(-length // 8), dtype=np.float32), block)[: -(-length * eighths // 8)]
    weights[:, length - 1] = weights[:, length - 1 :].sum(axis=1)
    return np.asarray(weights[:, :length], np.float32)


def _shrink(image: NDArray[np.uint8], eighths: int) -> NDArray[np.uint8]:
    """Reduce each block of 8x8 pixels to (eighths, eighths) like jidctint.c; a long image in bands, to save memory."""
    side = int(np.argmax(image.shape[:2]))
    if image.shape[side] > _BAND:
        bands = np.split(image, range(_BAND, image.shape[side], _BAND), axis=side)
        return np.concatenate([_shrink(band, eighths) for band in bands], axis=side)
    shrunk = image.astype(np.float32)
    for _ in range(2):
        blocks = shrunk.reshape(-1, 8, shrunk.shape[1] * 3)
        reduced = (_reduction(eighths) @ blocks).reshape(-1, shrunk.shape[1], 3)
        shrunk = np.asarray(cv2.transpose(reduced), np.float32)
    return np.clip(np.rint(shrunk), 0, 255).astype(np.uint8)


@cache
def _reduction(count: int) -> NDArray[np.float32]:
    """Return the (count, 8) matrix of jidctint.c: a DCT of 8 values, and the inverse of `count` low frequencies."""

    def waves(length: int) -> NDArray[np.float64]:
        positions, frequencies = np.arange(length) + 0.5, np.arange(count)[:, None]
        scale = np.where(frequencies == 0, 1.0, 2.0) / 8
        return np.asarray(np.sqrt(scale) * np.cos(np.pi * frequencies * positions / length))

    return (waves(count).T @ waves(8)).astype(np.float32)


def display_size(grid: Grid, side: int) -> Grid:
    """Return height and width of a picture with the aspect ratio of `grid` and `side` pixels on its longer side."""
    scale = side / max(grid)
    return max(1, round(grid[0] * scale)), max(1, round(grid[1] * scale))
