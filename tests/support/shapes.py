"""Masks that are hard for run-length encoding and connected components, and maps that look like a network's."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray


def spiral(side: int) -> NDArray[np.uint8]:
    """One component, a pixel wide, that winds inwards."""
    mask = np.zeros((side, side), np.uint8)
    top, left, bottom, right = 0, 0, side - 1, side - 1
    while top <= bottom and left <= right:
        mask[top, max(left - 2, 0) : right + 1] = 1
        mask[top : bottom + 1, right] = 1
        mask[bottom, left : right + 1] = 1
        mask[top + 2 : bottom + 1, left] = 1
        top, left, bottom, right = top + 2, left + 2, bottom - 2, right - 2
    return mask


def comb(height: int, width: int, tooth: int = 2) -> NDArray[np.uint8]:
    """Teeth that are connected only in the last row, so that components join late."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, ::tooth] = 1
    mask[-1] = 1
    return mask


def checkerboard(height: int, width: int) -> NDArray[np.uint8]:
    """Almost as many runs as a grid can hold, in one component that is connected only diagonally."""
    return (np.add.outer(np.arange(height), np.arange(width)) % 2).astype(np.uint8)


def smooth_map(rng: np.random.Generator, height: int, width: int, sigma: float = 4) -> NDArray[np.uint8]:
    """Levels 0..255 in blobs, as a network gives them."""
    noise = cv2.GaussianBlur(rng.random((height, width)), (0, 0), sigma)
    return np.asarray(cv2.normalize(noise, noise, 0, 255, cv2.NORM_MINMAX).round(), np.uint8)


def _one(height: int, width: int, *pixels: tuple[int, int]) -> NDArray[np.uint8]:
    mask = np.zeros((height, width), np.uint8)
    for pixel in pixels:
        mask[pixel] = 1
    return mask


MASKS: dict[str, NDArray[np.uint8]] = {
    "empty": np.zeros((7, 5), np.uint8),
    "full": np.ones((7, 5), np.uint8),
    "1x1 on": np.ones((1, 1), np.uint8),
    "1x1 off": np.zeros((1, 1), np.uint8),
    "one row": np.array([[1, 0, 1, 1, 0, 1]], np.uint8),
    "one column": np.array([[1], [0], [1], [1], [0], [1]], np.uint8),
    "first pixel": _one(7, 5, (0, 0)),
    "last pixel": _one(7, 5, (6, 4)),
    "corners": _one(7, 5, (0, 0), (0, 4), (6, 0), (6, 4)),
    "bottom then top": _one(7, 5, (6, 1), (0, 2)),  # one run of the text, in two columns and two components
    "checkerboard": checkerboard(9, 12),
    "checkerboard, odd": checkerboard(11, 7),
    "rows": np.repeat([[1], [0], [1], [0]], 9, axis=1).astype(np.uint8),
    "columns": np.repeat([[1, 0, 1, 0]], 9, axis=0).astype(np.uint8),
    "diagonal": np.eye(12, dtype=np.uint8),
    "antidiagonal": np.ascontiguousarray(np.eye(12, dtype=np.uint8)[::-1]),
    "cross of diagonals": np.eye(13, dtype=np.uint8) | np.eye(13, dtype=np.uint8)[::-1],
    "spiral": spiral(23),
    "comb": comb(15, 21),
    "comb upside down": np.ascontiguousarray(comb(15, 21)[::-1]),
    "comb on its side": np.ascontiguousarray(comb(15, 21).T),
    "comb on its other side": np.ascontiguousarray(comb(15, 21)[::-1].T),
    "combs that interlock": np.ascontiguousarray(np.vstack([comb(9, 20, 4), comb(9, 20, 4)[::-1]])),
    "no rows": np.zeros((0, 5), np.uint8),
    "no columns": np.zeros((7, 0), np.uint8),
}
"""Name -> (H, W) uint8 mask of 0 and 1."""
