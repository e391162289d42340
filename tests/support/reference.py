"""The notebook's algorithms, simple and slow: the reference for the fast code.

Nothing here imports cloudrt, so that an error cannot hide on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray


def rle_encode(mask: NDArray[Any]) -> str:
    """Return the RLE text of an (H, W) mask, from NumPy differences of the flattened transpose."""
    pixels = np.concatenate([[0], (mask.T != 0).astype(np.int8).flatten(), [0]])
    runs = np.where(pixels[1:] != pixels[:-1])[0] + 1
    runs[1::2] -= runs[::2]
    return " ".join(str(number) for number in runs)


def rle_decode(text: str, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Return the (H, W) mask of a sound RLE text, one run after the other."""
    flat = np.zeros(shape[0] * shape[1], np.uint8)
    numbers = [int(token) for token in text.split()]
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        flat[start - 1 : start - 1 + length] = 1
    return flat.reshape(shape[1], shape[0]).T


def keep_large(mask: NDArray[np.uint8], min_area: int) -> NDArray[np.uint8]:
    """Return the 8-connected components of more than `min_area` pixels, each extracted by scanning the whole map."""
    kept = np.zeros(mask.shape, np.uint8)
    if not mask.size:
        return kept
    count, components = cv2.connectedComponents(np.ascontiguousarray(mask), connectivity=8)
    for number in range(1, count):
        component = components == number
        if component.sum() > min_area:
            kept[component] = 1
    return kept


def postprocess(probability: NDArray[Any], threshold: float, min_area: int) -> str:
    """Threshold, components, area filter, RLE."""
    return rle_encode(keep_large((probability > threshold).astype(np.uint8), min_area))


def dice(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return 2|A and B| / (|A| + |B|), pixel by pixel; 1 where both are empty."""
    both = total = 0
    for on_a, on_b in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True):
        both += bool(on_a) and bool(on_b)
        total += bool(on_a) + bool(on_b)
    return 1.0 if total == 0 else 2 * both / total


def shrink(mask: NDArray[np.uint8], block: tuple[int, int]) -> NDArray[np.bool_]:
    """Bring a mask to a coarser grid, block by block: on where at least half of the block is."""
    height, width = mask.shape[0] // block[0], mask.shape[1] // block[1]
    small = np.zeros((height, width), bool)
    for y in range(height):
        for x in range(width):
            pixels = mask[y * block[0] : (y + 1) * block[0], x * block[1] : (x + 1) * block[1]]
            small[y, x] = pixels.sum() >= pixels.size / 2
    return small


def search(
    maps: NDArray[np.uint8], truths: NDArray[np.uint8], thresholds: Sequence[int], min_areas: Sequence[int]
) -> tuple[int, int, float]:
    """Return threshold, min area and mean Dice of the best rule for (N, H, W) maps and masks: every pair is tried.

    Of equally good rules, the first one tried.
    """
    best = (-1, -1, -1.0)
    for threshold in thresholds:
        for min_area in min_areas:
            total = 0.0
            for levels, truth in zip(maps, truths, strict=True):
                predicted = keep_large((levels > threshold).astype(np.uint8), min_area).astype(bool)
                pixels = predicted.sum() + (truth != 0).sum()
                total += 2 * (predicted & (truth != 0)).sum() / pixels if pixels else 1.0
            if total / len(maps) > best[2] + 1e-12:
                best = (threshold, min_area, float(total / len(maps)))
    return best
