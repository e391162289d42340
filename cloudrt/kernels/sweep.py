"""The areas that the exact search of rules needs, computed for one map in one pass.

For each threshold and min area, these are the number of pixels that are kept and the number of them that are on in the
truth mask (the true pixels).

As the threshold decreases from 255, components appear, grow and merge. A flood fill visits the pixels in that order
(Nister & Stewenius, "Linear time maximally stable extremal regions", ECCV 2008): it moves to a brighter neighbour
first, and a stack holds the unfinished component of each lower level. When the flood continues at a lower level,
the component is complete for all thresholds in between. Its area determines which min areas keep it. Instead of
counting it for each of these thresholds and min areas, the kernel stores differences at the ends of the two ranges, and
computes cumulative sums at the end. Each pixel is visited once and its eight neighbours are examined once, independent
of the number of thresholds and min areas.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloudrt.kernels.bits import ONE, leading_zeros
from cloudrt.kernels.jit import kernel

PIXEL = np.dtype([("below", np.int32), ("rank", np.int16), ("side", np.uint8), ("true", np.uint8)])
"""State of a pixel of the flood:

below
    The next pixel of the same rank that waits to be visited; -1 for none.
rank
    The number of thresholds at which the pixel is on.
side
    The number of neighbours examined so far, `DONE` after the last, `UNSEEN` before the first visit.
true
    1 where the truth is on.
"""

DONE = 8
UNSEEN = 255

Pixels = NDArray[Any]


@kernel
def sweep(
    levels: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    ranks: NDArray[np.int16],
    min_areas: NDArray[np.int64],
    pixels: Pixels,
    tables: NDArray[np.int64],
) -> None:
    """Count the pixels that each threshold and min area keeps.

    Parameters
    ----------
    levels
        (W, H) probability levels.
    truth
        (W, H), 0 or 1.
    ranks
        (256,): how many of the T thresholds are lower than each level; a pixel of rank r is on for the
        thresholds with the indices 0 to r - 1.
    min_areas
        (A,), ascending.
    pixels
        Work space, (W + 2) * (H + 2) entries of `PIXEL`: the map with a frame of one pixel.
    tables
        Output, (2, T, A): number of pixels, and of true pixels, in the components larger than the min area.
    """
    width, height = levels.shape
    tall = height + 2
    _fill_frame(levels, truth, ranks, pixels)
    tables[:] = 0
    steps = np.array([-1, 1, -tall, tall, -tall - 1, -tall + 1, tall - 1, tall + 1])
    thresholds = tables.shape[1]
    top = np.full(thresholds + 1, -1, np.int32)
    waiting = np.zeros((thresholds >> 6) + 1, np.uint64)
    stack = np.empty((thresholds + 2, 3), np.int64)
    for source in range(tall, (width + 1) * tall):
        if pixels[source].side == UNSEEN:
            _flood(source, steps, min_areas, pixels, top, waiting, stack, tables)
    _sum_up(tables[0])
    _sum_up(tables[1])


@kernel
def _fill_frame(levels: NDArray[np.uint8], truth: NDArray[np.uint8], ranks: NDArray[np.int16], pixels: Pixels) -> None:
    """Copy the map into `pixels`; the frame, and pixels that are off at every threshold, are marked as visited."""
    width, height = levels.shape
    for at in range(height + 2):
        pixels[at].side = DONE
        pixels[(width + 1) * (height + 2) + at].side = DONE
    for x in range(width):
        begin = (x + 1) * (height + 2)
        pixels[begin].side = DONE
        pixels[begin + height + 1].side = DONE
        for y in range(height):
            rank = ranks[levels[x, y]]
            pixels[begin + 1 + y].rank = rank
            pixels[begin + 1 + y].side = UNSEEN if rank > 0 else DONE
            pixels[begin + 1 + y].true = truth[x, y]


@kernel
def _flood(
    at: int,
    steps: NDArray[np.int64],
    min_areas: NDArray[np.int64],
    pixels: Pixels,
    top: NDArray[np.int32],
    waiting: NDArray[np.uint64],
    stack: NDArray[np.int64],
    tables: NDArray[np.int64],
) -> None:
    """Count every component, at every threshold, of the pixels connected to `at` at the lowest threshold.

    `stack` holds rank, area and true pixels of the unfinished components, each brighter than the one below it.
    `top[r]` is the first pixel of rank r that waits to be visited; bit r of `waiting` tells whether there is one.
    """
    pixels[at].side = 0
    level = int(pixels[at].rank)
    depth = 0
    stack[0, 0] = level
    stack[0, 1:] = 0
    while True:
        step = int(pixels[at].side)
        while step < 8:
            neighbour = at + steps[step]
            step += 1
            if pixels[neighbour].side == UNSEEN:
                pixels[neighbour].side = 0
                other = int(pixels[neighbour].rank)
                if other > level:  # visit the brighter pixel first; this pixel's other neighbours are examined later
                    pixels[at].side = step
                    _wait(top, waiting, pixels, level, at)
                    at = neighbour
                    level = other
                    step = 0
                    depth += 1
                    stack[depth, 0] = level
                    stack[depth, 1:] = 0
                else:
                    _wait(top, waiting, pixels, other, neighbour)
        pixels[at].side = DONE
        stack[depth, 1] += 1
        stack[depth, 2] += pixels[at].true
        lower = _brightest(waiting)
        if lower < level:
            depth = _descend(stack, depth, lower, min_areas, tables)
            if lower == 0:
                return
            level = lower
        at = int(top[level])
        top[level] = pixels[at].below
        if top[level] < 0:
            waiting[level >> 6] &= ~(ONE << np.uint64(level & 63))


@kernel
def _descend(
    stack: NDArray[np.int64], depth: int, lower: int, min_areas: NDArray[np.int64], tables: NDArray[np.int64]
) -> int:
    """Finish the components above `lower`: count each and merge it into the one below; return the new depth."""
    while stack[depth, 0] > lower:
        under = max(stack[depth - 1, 0], lower) if depth > 0 else lower
        _count(tables, min_areas, stack[depth], under)
        if depth > 0 and stack[depth - 1, 0] >= lower:
            depth -= 1
            stack[depth, 1:] += stack[depth + 1, 1:]
        else:
            stack[depth, 0] = lower
    return depth


@kernel
def _wait(top: NDArray[np.int32], waiting: NDArray[np.uint64], pixels: Pixels, rank: int, pixel: int) -> None:
    """Push a pixel onto the list of its rank."""
    pixels[pixel].below = top[rank]
    top[rank] = pixel
    waiting[rank >> 6] |= ONE << np.uint64(rank & 63)


@kernel
def _brightest(waiting: NDArray[np.uint64]) -> int:
    """Return the highest rank with a waiting pixel; 0 for none."""
    for w in range(waiting.size - 1, -1, -1):
        if waiting[w]:
            position: int = 64 * w + 63 - leading_zeros(waiting[w])
            return position
    return 0


@kernel
def _count(tables: NDArray[np.int64], min_areas: NDArray[np.int64], component: NDArray[np.int64], under: int) -> None:
    """Count a component that is complete for the thresholds `under` to `rank` - 1, as differences at both ends."""
    rank, area, true = component
    if area <= min_areas[0]:
        return
    last = np.searchsorted(min_areas, area) - 1  # the largest min area that keeps it
    tables[0, rank - 1, last] += area
    tables[1, rank - 1, last] += true
    if under > 0:
        tables[0, under - 1, last] -= area
        tables[1, under - 1, last] -= true


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
