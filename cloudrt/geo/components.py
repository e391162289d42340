"""Components of a panorama's mask; where it goes around the Earth, the last column adjoins the first."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.masks.rule import Rule

Labelled = NDArray[np.int32]


def label(mask: NDArray[np.uint8], wraps: bool = False) -> tuple[Labelled, int]:
    """Number the 8-connected components of a mask.

    Numbers ascend with the top, then the left side of the components' bounding boxes, so that removing components from
    a mask does not change the order of the others.

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
    count, found, stats, _ = cv2.connectedComponentsWithStats(np.ascontiguousarray(mask), connectivity=8)
    sides = (cv2.CC_STAT_TOP, cv2.CC_STAT_LEFT, cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT)
    numbers = _numbers(*(stats[1:, side] for side in sides))
    if wraps:
        numbers = _join_sides(numbers[found[:, 0]], numbers[found[:, -1]], count)[numbers]
    return numbers[found], int(numbers.max())


def _numbers(tops: NDArray[Any], lefts: NDArray[Any], widths: NDArray[Any], heights: NDArray[Any]) -> Labelled:
    """Return the numbers of components, in the order of their bounding boxes, after a 0 for the background."""
    # No two components have the same bounding box: both would touch all four of its sides, and therefore each other.
    numbers = np.zeros(len(tops) + 1, np.int32)
    numbers[np.lexsort((heights, widths, lefts, tops)) + 1] = np.arange(1, len(numbers), dtype=np.int32)
    return numbers


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


def keep_components(levels: NDArray[np.uint8], rule: Rule, wraps: bool = False) -> tuple[str, tuple[float, ...]]:
    """Apply the threshold and the min area of a rule to the levels of a panorama.

    Parameters
    ----------
    levels
        (W, H): one class, in RLE order.
    rule
        Its presence and gate are not applied here, but to each tile.
    wraps
        Whether the last column adjoins the first.

    Returns
    -------
    text
        RLE text of the components that are kept.
    means
        Mean probability, 0..1, of each of these components, in the order of `label`.
    """
    from cloudrt.kernels import digits, runs  # importing numba takes about a second

    if rule.threshold >= 255 or not levels.size:
        return "", ()
    width, height = levels.shape
    most = runs.most_runs(width, height)
    edges, first = np.empty(2 * most, np.int32), np.empty(width + 1, np.int32)
    parent, area, totals = np.empty(most, np.int32), np.empty(most, np.int32), np.empty(most, np.int64)
    levels, least = np.ascontiguousarray(levels), np.uint8(rule.threshold + 1)
    count = runs.label_runs(levels, least, edges, first, parent, area, totals)
    found, roots = edges[: 2 * count].reshape(-1, 2), np.flatnonzero(parent[:count] == np.arange(count))
    position = np.empty(count, np.intp)
    position[roots] = np.arange(len(roots))
    component = position[parent[:count]]
    columns, tops, bottoms = found[:, 0] // height, found[:, 0] % height, (found[:, 1] - 1) % height
    right, top, bottom = (np.full(len(roots), value) for value in (0, height, 0))
    np.maximum.at(right, component, columns)
    np.minimum.at(top, component, tops)
    np.maximum.at(bottom, component, bottoms)
    left = columns[roots]  # the root of a component is its first run
    numbers = _numbers(top, left, right - left, bottom - top)
    if wraps:
        sides = np.zeros((2, height), np.int32)
        for side, runs_of in enumerate((range(first[1]), range(first[width - 1], count))):
            for run in runs_of:
                sides[side, tops[run] : bottoms[run] + 1] = numbers[component[run] + 1]
        numbers = _join_sides(sides[0], sides[1], len(numbers))[numbers]
    number = numbers[component + 1]
    areas, sums = (np.bincount(number, weights, minlength=1) for weights in (found[:, 1] - found[:, 0], totals[:count]))
    keep = areas > rule.min_area
    kept = found[keep[number]]
    text = np.empty(kept.size * (len(str(levels.size)) + 1) + 8, np.uint8)
    length = digits.write_runs(kept.ravel(), len(kept), text)
    means = sums[keep] / areas[keep] / 255
    return str(text[:length].data, "ascii"), tuple(round(float(mean), 4) for mean in means)
