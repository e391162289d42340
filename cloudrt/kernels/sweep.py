"""All thresholds of a map at once: how many pixels, and how many true ones, every threshold and min area would keep.

Lowering the threshold from the top, components appear, grow and merge. The flood visits the pixels in that order, as
water fills a landscape upside down (Nister & Stewenius, "Linear time maximally stable extremal regions", ECCV 2008):
it climbs to the brightest neighbour, and a stack holds the component of each level that it has left unfinished below.
When the flood must leave a component for a lower level, the component is whole for all the thresholds in between; its
area says which min areas keep it, and one difference at each end of that span counts it for all of them. Each pixel is
entered once and looks at its eight neighbours once, whatever the number of thresholds and min areas.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloudrt.kernels.bits import ONE, leading_zeros
from cloudrt.kernels.jit import kernel

DONE = 8
"""A pixel's `side` once all of its neighbours were looked at; the frame around the map begins so."""

UNSEEN = 255


@kernel
def sweep(
    levels: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    ranks: NDArray[np.int16],
    min_areas: NDArray[np.int64],
    area_table: NDArray[np.int64],
    overlap_table: NDArray[np.int64],
    rank: NDArray[np.int16],
    side: NDArray[np.uint8],
    true: NDArray[np.uint8],
    below: NDArray[np.int32],
) -> None:
    """Fill both tables (T, A): pixels, and true pixels, that threshold t and min area a keep.

    `levels` is (W, H) and `truth`, 0 or 1, the same; `ranks[level]` is how many of the T thresholds are lower than it,
    so that its pixel is on for thresholds 0 ... ranks[level] - 1; `min_areas` (A,) ascends. `rank`, `side`, `true` and
    `below` are work space of (W + 2) * (H + 2) entries: the map with a frame of one pixel.
    """
    width, height = levels.shape
    tall = height + 2
    _frame(levels, truth, ranks, rank, side, true)
    area_table[:] = 0
    overlap_table[:] = 0
    steps = np.array([-1, 1, -tall, tall, -tall - 1, -tall + 1, tall - 1, tall + 1])
    thresholds = area_table.shape[0]
    top = np.full(thresholds + 1, -1, np.int32)
    waiting = np.zeros((thresholds >> 6) + 1, np.uint64)
    stack = np.empty((thresholds + 2, 3), np.int64)
    for source in range(tall, (width + 1) * tall):
        if side[source] == UNSEEN:
            _flood(source, steps, min_areas, rank, side, true, below, top, waiting, stack, area_table, overlap_table)
    _sum_up(area_table)
    _sum_up(overlap_table)


@kernel
def _frame(
    levels: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    ranks: NDArray[np.int16],
    rank: NDArray[np.int16],
    side: NDArray[np.uint8],
    true: NDArray[np.uint8],
) -> None:
    """Copy the map into its frame; the frame, and pixels that are never on, are done with before the flood begins."""
    width, height = levels.shape
    side[: height + 2] = DONE
    side[(width + 1) * (height + 2) :] = DONE
    for x in range(width):
        begin = (x + 1) * (height + 2)
        side[begin] = DONE
        side[begin + height + 1] = DONE
        for y in range(height):
            r = ranks[levels[x, y]]
            rank[begin + 1 + y] = r
            side[begin + 1 + y] = UNSEEN if r > 0 else DONE
            true[begin + 1 + y] = truth[x, y]


@kernel
def _flood(
    at: int,
    steps: NDArray[np.int64],
    min_areas: NDArray[np.int64],
    rank: NDArray[np.int16],
    side: NDArray[np.uint8],
    true: NDArray[np.uint8],
    below: NDArray[np.int32],
    top: NDArray[np.int32],
    waiting: NDArray[np.uint64],
    stack: NDArray[np.int64],
    area_table: NDArray[np.int64],
    overlap_table: NDArray[np.int64],
) -> None:
    """Count every component, of every threshold, of the pixels that are connected to `at` at the lowest threshold.

    `stack` holds rank, area and overlap of the unfinished components, each brighter than the one below it. `top[r]` is
    the first of the pixels of rank r that wait to be visited and `below` the next of each; bit r of `waiting` says
    whether there are any.
    """
    side[at] = 0
    level = int(rank[at])
    depth = 0
    stack[0, 0] = level
    stack[0, 1:] = 0
    while True:
        step = int(side[at])
        while step < 8:
            neighbour = at + steps[step]
            step += 1
            if side[neighbour] == UNSEEN:
                side[neighbour] = 0
                other = int(rank[neighbour])
                if other > level:  # climb first; the other neighbours of this pixel wait with it
                    side[at] = step
                    _wait(top, waiting, below, level, at)
                    at = neighbour
                    level = other
                    step = 0
                    depth += 1
                    stack[depth, 0] = level
                    stack[depth, 1:] = 0
                else:
                    _wait(top, waiting, below, other, neighbour)
        side[at] = DONE
        stack[depth, 1] += 1
        stack[depth, 2] += true[at]
        lower = _brightest(waiting)
        if lower < level:
            depth = _descend(stack, depth, lower, min_areas, area_table, overlap_table)
            if lower == 0:
                return
            level = lower
        at = int(top[level])
        top[level] = below[at]
        if top[level] < 0:
            waiting[level >> 6] &= ~(ONE << np.uint64(level & 63))


@kernel
def _descend(
    stack: NDArray[np.int64],
    depth: int,
    lower: int,
    min_areas: NDArray[np.int64],
    area_table: NDArray[np.int64],
    overlap_table: NDArray[np.int64],
) -> int:
    """Finish the components above `lower`, each counted and merged into the one below it; return the new depth."""
    while stack[depth, 0] > lower:
        under = max(stack[depth - 1, 0], lower) if depth > 0 else lower
        _count(area_table, overlap_table, min_areas, stack[depth], under)
        if depth > 0 and stack[depth - 1, 0] >= lower:
            depth -= 1
            stack[depth, 1:] += stack[depth + 1, 1:]
        else:
            stack[depth, 0] = lower
    return depth


@kernel
def _wait(top: NDArray[np.int32], waiting: NDArray[np.uint64], below: NDArray[np.int32], rank: int, pixel: int) -> None:
    """Put a pixel on the pile of its rank."""
    below[pixel] = top[rank]
    top[rank] = pixel
    waiting[rank >> 6] |= ONE << np.uint64(rank & 63)


@kernel
def _brightest(waiting: NDArray[np.uint64]) -> int:
    """Return the highest rank that has a pixel; 0 where none has."""
    for w in range(waiting.size - 1, -1, -1):
        if waiting[w]:
            position: int = 64 * w + 63 - leading_zeros(waiting[w])
            return position
    return 0


@kernel
def _count(
    area_table: NDArray[np.int64],
    overlap_table: NDArray[np.int64],
    min_areas: NDArray[np.int64],
    component: NDArray[np.int64],
    under: int,
) -> None:
    """Count a component that is whole for the thresholds `under` ... `rank` - 1: a difference at either end."""
    rank, area, overlap = component
    if area <= min_areas[0]:
        return
    last = np.searchsorted(min_areas, area) - 1  # the largest min area that keeps it
    area_table[rank - 1, last] += area
    overlap_table[rank - 1, last] += overlap
    if under > 0:
        area_table[under - 1, last] -= area
        overlap_table[under - 1, last] -= overlap


@kernel
def _sum_up(table: NDArray[np.int64]) -> None:
    """Turn differences into sums: from the highest threshold down, and from the largest min area down."""
    rows, columns = table.shape
    for t in range(rows - 2, -1, -1):
        for a in range(columns):
            table[t, a] += table[t + 1, a]
    for t in range(rows):
        for a in range(columns - 2, -1, -1):
            table[t, a] += table[t, a + 1]
