"""Components of a panorama's mask, across its tiles and, where it goes around the Earth, across its first column."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.masks.postprocess import Rule

Labelled = NDArray[np.int32]


def label(mask: NDArray[np.uint8], wraps: bool = False) -> tuple[Labelled, int]:
    """Number the 8-connected components of a mask.

    The numbers depend on the shapes alone: they ascend with the top, then the left side of the components, so that the
    components of a mask that lost some of them keep their order.

    Parameters
    ----------
    mask
        (H, W); a pixel is on if it is not zero.
    wraps
        Whether the last column adjoins the first.

    Returns
    -------
    labels
        (H, W) int32: 0 where the mask is off, else 1 to `count`.
    count
        Number of components.
    """
    found, numbers, _ = _components(mask, wraps)
    return numbers[found], int(numbers.max())


def _components(
    mask: NDArray[np.uint8], wraps: bool, *, by_column: bool = False
) -> tuple[Labelled, Labelled, NDArray[np.int64]]:
    """Return the components of a mask as OpenCV numbers them, and the final number and the area of each.

    Parameters
    ----------
    mask
        (H, W), or (W, H) if `by_column`.
    wraps
        See `label`.
    by_column
        Whether the mask is transposed; the final numbers are those of the mask itself.
    """
    count, found, stats, _ = cv2.connectedComponentsWithStats(np.ascontiguousarray(mask), connectivity=8)
    # No two components fill the same box: one that touches all its sides leaves no way across it.
    sides = [cv2.CC_STAT_HEIGHT, cv2.CC_STAT_WIDTH, cv2.CC_STAT_LEFT, cv2.CC_STAT_TOP]
    if by_column:
        sides = [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT, cv2.CC_STAT_TOP, cv2.CC_STAT_LEFT]
    numbers = np.zeros(count, np.int32)
    numbers[np.lexsort([stats[1:, side] for side in sides]) + 1] = np.arange(1, count, dtype=np.int32)
    if wraps:
        first, last = (found[0], found[-1]) if by_column else (found[:, 0], found[:, -1])
        numbers = _join_sides(numbers[first], numbers[last], count)[numbers]
    return np.asarray(found, np.int32), numbers, stats[:, cv2.CC_STAT_AREA].astype(np.int64)


def _join_sides(left: Labelled, right: Labelled, count: int) -> Labelled:
    """Return the new number of each component, where those of the first and the last column are joined."""
    parent = np.arange(count, dtype=np.int32)

    def root(number: int) -> int:
        while parent[number] != number:
            number = int(parent[number])
        return number

    for row, one in enumerate(right):
        for other in left[max(row - 1, 0) : row + 2]:
            if one and other:
                a, b = root(int(one)), root(int(other))
                parent[max(a, b)] = min(a, b)
    roots = np.array([root(number) for number in range(count)])
    kept = np.unique(roots)
    return np.searchsorted(kept, roots).astype(np.int32)


def component_means(mask: NDArray[np.uint8], levels: NDArray[np.uint8]) -> tuple[float, ...]:
    """Return the mean probability, 0..1, of each component of a mask, in the order of `label`.

    Parameters
    ----------
    mask
        (H, W); a pixel is on if it is not zero.
    levels
        (W, H): the levels of its class, in RLE order.
    """
    numbers, count = label(mask)
    found = numbers.ravel()
    sums, areas = np.bincount(found, levels.T.ravel(), count + 1), np.bincount(found, minlength=count + 1)
    return tuple(round(float(mean), 4) for mean in sums[1:] / areas[1:] / 255)


def keep_components(
    levels: NDArray[np.uint8], rule: Rule, wraps: bool = False
) -> tuple[NDArray[np.uint8], tuple[float, ...]]:
    """Apply the threshold and the min area of a rule to the levels of a panorama.

    Parameters
    ----------
    levels
        (W, H): one class, in RLE order.
    rule
        Its presence and gate are not applied: they decide for each tile.
    wraps
        Whether the last column adjoins the first.

    Returns
    -------
    mask
        (H, W) uint8, 0 or 1, Fortran-ordered.
    means
        Mean probability, 0..1, of each component, in the order of `label`.
    """
    from cloudrt.kernels import components  # importing numba takes about a second

    levels = np.ascontiguousarray(levels)
    found, numbers, areas = _components((levels > rule.threshold).view(np.uint8), wraps, by_column=True)
    sums = np.zeros(len(numbers), np.int64)
    components.sum_levels(found, levels, sums)
    areas[0] = 0
    all_areas, all_sums = (np.bincount(numbers, weights=values) for values in (areas, sums))
    keep = all_areas > max(rule.min_area, 0)
    mask = np.empty(levels.shape, np.uint8)
    components.select(found, keep[numbers].view(np.uint8), mask)
    means = all_sums[keep] / all_areas[keep] / 255
    return mask.T, tuple(round(float(mean), 4) for mean in means)
