"""From bits to runs, from runs to components, from components to text.

A run is a stretch `[start, stop)` of one column, in pixels of the whole mask counted in RLE order; `edges` holds start,
stop, start, stop, ...; the runs of column x are those numbered `first[x] ... first[x + 1] - 1`. A smooth mask of
184,000 pixels has some 500 runs: whatever follows the comparison of pixels is cheap because it works on runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloudrt.kernels import bits
from cloudrt.kernels.bits import BITS, ONE, at_least, bit_count, index, trailing_zeros, word_at
from cloudrt.kernels.digits import write_runs
from cloudrt.kernels.jit import kernel


@kernel
def _mark_changes(word: np.uint64, carry: np.uint64, begin: int, edges: NDArray[np.int32], count: int) -> int:
    """Write where the pixels of a word differ from the one before; return how many edges there are then.

    The bits of the word and of the word shifted by one, exclusive or; `carry` is the pixel before the first.
    """
    changes = word ^ ((word << ONE) | carry)
    while changes:
        edges[index(count)] = begin + trailing_zeros(changes)
        count += 1
        changes &= changes - ONE
    return count


@kernel
def _count_at_least(flat: NDArray[Any], begin: int, length: int, least: Any) -> int:
    """Return how many of `flat[begin : begin + length]` are at least `least`."""
    count = 0
    words = length // BITS
    for _ in range(words):
        count += bit_count(at_least(flat, begin, least))
        begin += BITS
    if length > BITS * words:
        count += bit_count(word_at(flat, begin, length - BITS * words, least))
    return count


@kernel
def find_runs_in_levels(
    columns: NDArray[Any], least: Any, gate: Any, gate_pixels: int, edges: NDArray[np.int32], first: NDArray[np.int32]
) -> int:
    """Write the runs of pixels of at least `least`; return how many there are: the one reading of every pixel.

    `columns` is (W, H); `edges` holds at least 2 * W * ceil(H / 2) entries, `first` W + 1. There are no runs where
    fewer than `gate_pixels` pixels are at least `gate`.
    """
    width, height = columns.shape
    flat = columns.reshape(columns.size)
    words = height // BITS
    rest = height - BITS * words
    above = 0
    count = 0
    begin = 0
    for x in range(width):
        if gate_pixels > 0:  # before the runs of the same column, whose pixels then lie in the nearest cache
            above += _count_at_least(flat, begin, height, gate)
        first[x] = count >> 1
        carry = np.uint64(0)
        for _ in range(words):
            word = at_least(flat, begin, least)
            count = _mark_changes(word, carry, begin, edges, count)
            carry = word >> np.uint64(BITS - 1)
            begin += BITS
        if rest:
            word = word_at(flat, begin, rest, least)
            count = _mark_changes(word, carry, begin, edges, count)
            begin += rest
        elif carry:
            edges[count] = begin
            count += 1
    first[width] = count >> 1
    return count >> 1 if above >= gate_pixels else 0


@kernel
def find_runs_in_words(
    words: NDArray[np.uint64], height: int, edges: NDArray[np.int32], first: NDArray[np.int32]
) -> int:
    """Do the same from bits, (W, ceil(H / 64)), those past the height being zero."""
    width, per_column = words.shape
    count = 0
    for x in range(width):
        first[x] = count >> 1
        carry = np.uint64(0)
        for w in range(per_column):
            count = _mark_changes(words[x, w], carry, x * height + BITS * w, edges, count)
            carry = words[x, w] >> np.uint64(BITS - 1)
        if carry:
            edges[count] = (x + 1) * height
            count += 1
    first[width] = count >> 1
    return count >> 1


@kernel
def _root(parent: NDArray[np.int32], run: int) -> int:
    """Return the root of `run`, halving the path on the way (Tarjan & van Leeuwen, J. ACM 31(2), 1984)."""
    while parent[index(run)] != run:
        parent[index(run)] = parent[index(parent[index(run)])]
        run = parent[index(run)]
    return run


@kernel
def join_runs(
    edges: NDArray[np.int32],
    first: NDArray[np.int32],
    width: int,
    height: int,
    parent: NDArray[np.int32],
    area: NDArray[np.int32],
) -> None:
    """Join runs into 8-connected components: `parent[i]` becomes the root of run i, `area[root]` the pixel count.

    Runs of neighbouring columns touch, diagonals included, where neither ends before the other begins. The root is the
    component's first run, so that one pass from the first run to the last finds every root made.
    """
    count = first[width]
    for run in range(count):
        parent[run] = run
        area[run] = 0
    for x in range(1, width):
        left, left_end = first[x - 1], first[x]
        right, right_end = left_end, first[x + 1]
        while left < left_end and right < right_end:
            left_stop = edges[index(2 * left + 1)] + height  # in the pixels of the column to its right
            right_stop = edges[index(2 * right + 1)]
            if edges[index(2 * left)] + height <= right_stop and edges[index(2 * right)] <= left_stop:
                a = _root(parent, left)
                if parent[index(right)] == right:  # touched for the first time, as most runs are touched but once
                    parent[index(right)] = a
                else:
                    b = _root(parent, right)
                    parent[index(max(a, b))] = min(a, b)
            if left_stop < right_stop:
                left += 1
            else:
                right += 1
    for run in range(count):
        root = parent[index(parent[index(run)])]
        parent[index(run)] = root
        area[index(root)] += edges[index(2 * run + 1)] - edges[index(2 * run)]


@kernel
def keep_runs(
    edges: NDArray[np.int32], count: int, parent: NDArray[np.int32], area: NDArray[np.int32], min_area: int
) -> int:
    """Move the runs of components larger than `min_area` to the front of `edges`; return how many there are."""
    kept = 0
    for run in range(count):
        edges[index(2 * kept)] = edges[index(2 * run)]
        edges[index(2 * kept + 1)] = edges[index(2 * run + 1)]
        kept += int(area[index(parent[index(run)])] > min_area)
    return kept


@kernel
def _runs_to_text(
    count: int,
    min_area: int,
    width: int,
    height: int,
    edges: NDArray[np.int32],
    first: NDArray[np.int32],
    parent: NDArray[np.int32],
    area: NDArray[np.int32],
    text: NDArray[np.uint8],
) -> int:
    if min_area > 0 and count > 0:
        join_runs(edges, first, width, height, parent, area)
        count = keep_runs(edges, count, parent, area, min_area)
    return write_runs(edges, count, text)


@kernel
def columns_to_text(
    columns: NDArray[Any],
    least: Any,
    min_area: int,
    gate: Any,
    gate_pixels: int,
    edges: NDArray[np.int32],
    first: NDArray[np.int32],
    parent: NDArray[np.int32],
    area: NDArray[np.int32],
    text: NDArray[np.uint8],
) -> int:
    """Write the RLE text of a map that lies in RLE order, (W, H); return its length in bytes.

    A pixel is on where it is at least `least`; the map is empty where fewer than `gate_pixels` are at least `gate`.
    """
    width, height = columns.shape
    count = find_runs_in_levels(columns, least, gate, gate_pixels, edges, first)
    return _runs_to_text(count, min_area, width, height, edges, first, parent, area, text)


@kernel
def rows_to_text(
    rows: NDArray[Any],
    least: Any,
    min_area: int,
    row_words: NDArray[np.uint64],
    words: NDArray[np.uint64],
    edges: NDArray[np.int32],
    first: NDArray[np.int32],
    parent: NDArray[np.int32],
    area: NDArray[np.int32],
    text: NDArray[np.uint8],
) -> int:
    """Do the same from a map that lies row by row, (H, W).

    `row_words` (H, ceil(W / 64)) and `words` (W, ceil(H / 64)) are for its bits.
    """
    height, width = rows.shape
    bits.pack(rows, least, row_words)
    bits.transpose(row_words, height, width, words)
    count = find_runs_in_words(words, height, edges, first)
    return _runs_to_text(count, min_area, width, height, edges, first, parent, area, text)


@kernel
def maps_to_texts(
    levels: NDArray[np.uint8],
    rules: NDArray[np.int64],
    presence: NDArray[np.uint8],
    ends: NDArray[np.int64],
    edges: NDArray[np.int32],
    first: NDArray[np.int32],
    parent: NDArray[np.int32],
    area: NDArray[np.int32],
    text: NDArray[np.uint8],
) -> None:
    """Write the RLE texts of maps, (M, W, H), one after the other; `ends[m]` is where each ends.

    `rules` is (C, 5): threshold, min area, gate threshold, gate pixels, presence; map m is of class m % C, and
    `presence` (M,) is its presence level.
    """
    end = 0
    for m in range(levels.shape[0]):
        threshold, min_area, gate_threshold, gate_pixels, least_presence = rules[m % rules.shape[0]]
        if threshold < 255 and presence[m] >= least_presence and (gate_pixels == 0 or gate_threshold < 255):
            end += columns_to_text(
                levels[m],
                np.uint8(threshold + 1),
                min_area,
                np.uint8(gate_threshold + 1),
                gate_pixels,
                edges,
                first,
                parent,
                area,
                text[end:],
            )
        ends[m] = end
