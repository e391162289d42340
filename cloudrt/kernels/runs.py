"""From a map to runs, from runs to components, from components to text: what post-processing spends its time on.

A map is read column by column: `levels` has shape (W, H), C-contiguous, so that memory order is RLE order. A run is a
stretch `[start, stop)` of one column, in rows; runs of column x are those numbered `first[x] ... first[x + 1] - 1`.
Working on runs instead of pixels is what makes the components cheap: a smooth mask of 184,000 pixels has some 500 runs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloudrt.kernels.jit import kernel


@kernel
def find_runs(
    levels: NDArray[np.uint8],
    threshold: int,
    starts: NDArray[np.int32],
    stops: NDArray[np.int32],
    first: NDArray[np.int32],
) -> int:
    """Write the runs of pixels above `threshold`; return how many there are.

    `starts` and `stops` hold at least W * ceil(H / 2) entries, `first` W + 1.
    """
    width, height = levels.shape
    count = 0
    for x in range(width):
        first[x] = count
        inside = False
        for y in range(height):
            on = levels[x, y] > threshold
            if on != inside:
                if on:
                    starts[count] = y
                else:
                    stops[count] = y
                    count += 1
                inside = on
        if inside:
            stops[count] = height
            count += 1
    first[width] = count
    return count


@kernel
def _root(parent: NDArray[np.int32], run: int) -> int:
    """Return the root of `run`, halving the path on the way (Tarjan & van Leeuwen, J. ACM 31(2), 1984)."""
    while parent[run] != run:
        parent[run] = parent[parent[run]]
        run = parent[run]
    return run


@kernel
def join_runs(
    starts: NDArray[np.int32],
    stops: NDArray[np.int32],
    first: NDArray[np.int32],
    parent: NDArray[np.int32],
    area: NDArray[np.int64],
) -> None:
    """Join runs into 8-connected components: `parent[i]` becomes the root of run i, `area[root]` the pixel count.

    Runs of neighbouring columns touch, diagonals included, where neither ends before the other begins.
    """
    count = first[first.size - 1]
    for run in range(count):
        parent[run] = run
    for x in range(1, first.size - 1):
        left, left_end = first[x - 1], first[x]
        right, right_end = first[x], first[x + 1]
        while left < left_end and right < right_end:
            if starts[left] <= stops[right] and starts[right] <= stops[left]:
                a, b = _root(parent, left), _root(parent, right)
                if a < b:
                    parent[b] = a
                else:
                    parent[a] = b
            if stops[left] < stops[right]:
                left += 1
            else:
                right += 1
    area[:count] = 0
    for run in range(count):
        root = _root(parent, run)
        parent[run] = root
        area[root] += stops[run] - starts[run]


@kernel
def _write_number(text: NDArray[np.uint8], at: int, value: int) -> int:
    """Write `value` and a space at `at`; return the position after them."""
    digits = 1
    power = 10
    while value >= power:
        power *= 10
        digits += 1
    for place in range(at + digits - 1, at - 1, -1):
        text[place] = 48 + value % 10
        value //= 10
    text[at + digits] = 32
    return at + digits + 1


@kernel
def write_runs(
    starts: NDArray[np.int32],
    stops: NDArray[np.int32],
    first: NDArray[np.int32],
    parent: NDArray[np.int32],
    area: NDArray[np.int64],
    min_area: int,
    height: int,
    text: NDArray[np.uint8],
) -> int:
    """Write the RLE text of the components larger than `min_area`; return its length in bytes.

    A run that reaches the bottom of its column and one that begins at the top of the next are one run of the text.
    """
    at = 0
    begin, end = -1, -1
    for x in range(first.size - 1):
        for run in range(first[x], first[x + 1]):
            if area[parent[run]] <= min_area:
                continue
            start = x * height + starts[run]
            if start != end:
                if end >= 0:
                    at = _write_number(text, at, begin + 1)
                    at = _write_number(text, at, end - begin)
                begin = start
            end = x * height + stops[run]
    if end >= 0:
        at = _write_number(text, at, begin + 1)
        at = _write_number(text, at, end - begin)
    return max(at - 1, 0)


@kernel
def count_above(levels: NDArray[np.uint8], threshold: int) -> int:
    """Return how many entries of the map exceed `threshold`."""
    count = 0
    for x in range(levels.shape[0]):
        for y in range(levels.shape[1]):
            if levels[x, y] > threshold:
                count += 1
    return count


@kernel
def component_overlaps(
    starts: NDArray[np.int32],
    stops: NDArray[np.int32],
    first: NDArray[np.int32],
    parent: NDArray[np.int32],
    truth_sums: NDArray[np.int32],
    overlap: NDArray[np.int64],
) -> None:
    """Write into `overlap[root]` how many pixels of each component are true.

    `truth_sums` (W, H + 1): `truth_sums[x, y]` is the number of true pixels of column x above row y.
    """
    overlap[: first[first.size - 1]] = 0
    for x in range(first.size - 1):
        for run in range(first[x], first[x + 1]):
            overlap[parent[run]] += truth_sums[x, stops[run]] - truth_sums[x, starts[run]]
