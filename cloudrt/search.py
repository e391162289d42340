"""Search the Rule of each class over a validation set: the threshold and min area of the highest mean Dice.

For each map and threshold the components are found once, with their areas and their overlap with the truth; the Dice
of every min area then follows from those few numbers, without touching a pixel again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cloudrt.cpus import usable_cpus
from cloudrt.errors import DataError
from cloudrt.postprocess import Rule, Runs

THRESHOLDS = tuple(range(63, 240, 8))
MIN_AREAS = (0, 1000, 2500, 5000, 7500, *range(9000, 25001, 1000))
"""In pixels of the 350x525 grid; from 9,000 on, those of the notebook."""


@dataclass(frozen=True)
class Found:
    """The best rule of one class and its mean Dice over the validation set."""

    rule: Rule
    dice: float


def pack_mask(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack an (H, W) mask of 0 and 1 into bits in RLE order: (ceil(W * H / 8),) uint8."""
    return np.packbits(mask.T, axis=None)


def unpack_mask(bits: NDArray[np.uint8], grid: tuple[int, int]) -> NDArray[np.uint8]:
    """The inverse of `pack_mask`: an (H, W) uint8 mask of 0 and 1, Fortran-ordered."""
    height, width = grid
    return np.unpackbits(bits, count=width * height).reshape(width, height).T


def search_rules(
    probability: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    thresholds: Sequence[int] = THRESHOLDS,
    min_areas: Sequence[int] = MIN_AREAS,
    jobs: int | None = None,
    advance: Callable[[int], object] | None = None,
) -> list[Found]:
    """Return the best rule of each class; of equal ones, that of the lowest threshold, then the lowest min area.

    Parameters
    ----------
    probability
        (N, C, W, H) uint8: the artifact's output for N images.
    truth
        (N, C, ceil(W * H / 8)) uint8: masks packed by `pack_mask`.
    thresholds
        Levels 0..255 to try.
    min_areas
        Pixels to try.
    jobs
        Threads; one a core unless given.
    advance
        Called with 1 after each image.

    Raises
    ------
    DataError
        Another shape or dtype, no images, nothing to try.
    """
    if probability.ndim != 4 or probability.dtype != np.uint8:
        raise DataError(f"probability is (N, C, W, H) uint8, found {probability.shape} {probability.dtype}")
    if not len(thresholds) or not len(min_areas):
        raise DataError("nothing to search: give at least one threshold and one min area")
    images, classes, width, height = probability.shape
    if truth.shape != (images, classes, (width * height + 7) // 8) or not images:
        raise DataError(f"probability {probability.shape} and packed truth {truth.shape} do not belong together")
    levels = np.sort(np.asarray(thresholds))
    areas = np.sort(np.asarray(min_areas))

    def table(index: int) -> NDArray[np.float64]:
        runs = Runs(width, height)
        return np.stack(
            [
                _dice_table(runs, probability[index, c], unpack_mask(truth[index, c], (height, width)), levels, areas)
                for c in range(classes)
            ]
        )

    total = np.zeros((classes, len(levels), len(areas)))
    with ThreadPoolExecutor(jobs or usable_cpus()) as pool:
        for dice in pool.map(table, range(images)):  # summed in order: the same answer on any number of threads
            total += dice
            if advance:
                advance(1)
    best = []
    for dice in total / images:
        t, a = np.unravel_index(int(dice.argmax()), dice.shape)
        best.append(Found(Rule(int(levels[t]), int(areas[a])), float(dice[t, a])))
    return best


def _dice_table(
    runs: Runs,
    probability: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    thresholds: NDArray[np.int_],
    min_areas: NDArray[np.int_],
) -> NDArray[np.float64]:
    """Return the Dice of every threshold and min area for one map: (thresholds, min areas)."""
    columns = truth.T
    sums = np.zeros((columns.shape[0], columns.shape[1] + 1), np.int32)
    np.cumsum(columns, axis=1, out=sums[:, 1:])
    true_pixels = int(sums[:, -1].sum())
    levels = np.ascontiguousarray(probability)
    table = np.empty((len(thresholds), len(min_areas)))
    for row, threshold in enumerate(thresholds):
        if not runs.find(levels, int(threshold)):
            table[row:] = float(true_pixels == 0)  # higher thresholds leave nothing either
            break
        area, overlap = runs.component_overlaps(sums)
        keep = area[None, :] > min_areas[:, None]
        predicted = keep @ area
        both = predicted + true_pixels
        table[row] = np.where(both == 0, 1.0, 2 * (keep @ overlap) / np.maximum(both, 1))
    return table
