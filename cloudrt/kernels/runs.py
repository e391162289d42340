"""Conversion of levels or bits to runs, and of a map to RLE text by way of runs and components.

A run is a range `[start, stop)` of pixels of one column, numbered over the whole mask in RLE order. `edges` holds
start, stop, start, stop, ...; the runs of column x have the numbers `first[x]` to `first[x + 1] - 1`. A smooth mask of
184,000 pixels has about 500 runs, so the steps after thresholding process few elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray  # type: ignore[attr-defined]
from numpy.typing import NDArray

from cloudrt.kernels import bits
from cloudrt.kernels.bits import BITS, ONE, at_least, bit_count, index, pointer, trailing_zeros, word_at
from cloudrt.kernels.digits import write_runs
from cloudrt.kernels.jit import kernel
from cloudrt.kernels.union_find import Ints, join_runs, keep_runs


def most_runs(width: int, height: int) -> int:
    """Return the largest number of runs that a mask can have: every second pixel of each column."""
    return width * ((height + 1) // 2)


def work_size(width: int, height: int) -> int:
    """Return the number of int32 entries in the work space of `columns_to_text`: edges, roots, areas and first runs."""
    return 4 * most_runs(width, height) + width + 1


@kernel
def _mark_changes(word: np.uint64, carry: np.uint64, begin: int, edges: Ints, count: int) -> int:
    """Append the positions where a pixel differs from its predecessor to `edges`; return the new number of edges.

    These positions are the set bits of `word ^ (word << 1)`; `carry` is the pixel before the first.
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
    columns: NDArray[Any], least: Any, gate: Any, gate_pixels: int, edges: Ints, first: Ints
) -> int:
    """Find the runs of pixels that are at least `least`; return their number, or 0 if the gate rejects the map.

    Parameters
    ----------
    columns
        (W, H), C-contiguous; each pixel is read from memory once.
    least
        The smallest value that is on, of the dtype of `columns`.
    gate, gate_pixels
        The gate rejects the map if fewer than `gate_pixels` pixels are at least `gate`.
    edges
        Output, at least 2 * W * ceil(H / 2) entries.
    first
        Output, W + 1 entries.
    """
    width, height = columns.shape
    flat = columns.reshape(columns.size)
    words = height // BITS
    rest = height - BITS * words
    above = 0
    count = 0
    begin = 0
    for x in range(width):
        if gate_pixels > 0:  # counted per column, so that finding its runs reads from the L1 cache
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
def find_runs_in_words(words: NDArray[np.uint64], height: int, edges: Ints, first: Ints) -> int:
    """Find the runs of set bits in `words`, (W, ceil(H / 64)), with zeros beyond the height; return their number."""
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
def label_runs(
    columns: NDArray[np.uint8],
    least: np.uint8,
    edges: Ints,
    first: Ints,
    parent: Ints,
    area: Ints,
    totals: NDArray[np.int64],
) -> int:
    """Find runs and join them to components; return the number of runs. `totals[i]` is the sum of the levels of run i.

    See `find_runs_in_levels` and `join_runs`; `parent`, `area` and `totals` have W * ceil(H / 2) entries.
    """
    width, height = columns.shape
    count = find_runs_in_levels(columns, least, least, 0, edges, first)
    join_runs(edges, first, width, height, parent, area)
    flat = columns.reshape(columns.size)
    for run in range(count):
        total = 0
        for pixel in range(edges[2 * run], edges[2 * run + 1]):
            total += flat[pixel]
        totals[run] = total
    return count


@kernel
def _split(work: Ints, width: int, height: int) -> tuple[Ints, Ints, Ints, Ints]:
    """Return edges, first, parent and area as views of a work space of `work_size` entries."""
    most = width * ((height + 1) // 2)
    return work[: 2 * most], work[4 * most :], work[2 * most : 3 * most], work[3 * most : 4 * most]


@kernel
def _runs_to_text(count: int, min_area: int, width: int, height: int, work: Ints, text: NDArray[np.uint8]) -> int:
    edges, first, parent, area = _split(work, width, height)
    if min_area > 0 and count > 0:
        join_runs(edges, first, width, height, parent, area)
        count = keep_runs(edges, count, parent, area, min_area)
    return write_runs(edges, count, text)


@kernel
def columns_to_text(
    columns: NDArray[Any], least: Any, min_area: int, gate: Any, gate_pixels: int, work: Ints, text: NDArray[np.uint8]
) -> int:
    """Write the RLE text of a map in RLE order; return its length in bytes.

    Parameters
    ----------
    columns
        (W, H), C-contiguous.
    least
        A pixel is on where it is at least this.
    min_area
        Components of at most this many pixels are dropped.
    gate, gate_pixels
        The text is empty if fewer than `gate_pixels` pixels are at least `gate`.
    work
        Work space of `work_size(W, H)` entries.
    text
        Output: ASCII characters; at least 8 bytes longer than the text.
    """
    width, height = columns.shape
    edges, first, _, _ = _split(work, width, height)
    count = find_runs_in_levels(columns, least, gate, gate_pixels, edges, first)
    return _runs_to_text(count, min_area, width, height, work, text)


@kernel
def rows_to_text(
    rows: NDArray[Any],
    least: Any,
    min_area: int,
    row_words: NDArray[np.uint64],
    words: NDArray[np.uint64],
    work: Ints,
    text: NDArray[np.uint8],
) -> int:
    """Write the RLE text of a map in C order, (H, W); return its length in bytes.

    See `columns_to_text`; `row_words` (H, ceil(W / 64)) and `words` (W, ceil(H / 64)) are work space for the bits.
    """
    height, width = rows.shape
    bits.pack(rows, least, row_words)
    bits.transpose(row_words, height, width, words)
    edges, first, _, _ = _split(work, width, height)
    count = find_runs_in_words(words, height, edges, first)
    return _runs_to_text(count, min_area, width, height, work, text)


@kernel
def maps_to_texts(
    maps: tuple[NDArray[np.int64], int, int],
    rules: NDArray[np.int64],
    presence: NDArray[np.uint8],
    first: int,
    most: int,
    ends: NDArray[np.int64],
    work: Ints,
    text: NDArray[np.uint8],
) -> int:
    """Write the RLE texts of maps to one buffer, without separators, until the buffer may not hold the next text.

    Return the position of the first map whose text was not written: M after the last one.

    Parameters
    ----------
    maps
        The memory addresses, (M,), of M maps, and their W and H: each map is (W, H) uint8 levels, C-contiguous. The
        caller keeps the maps in memory. Map m is of class m % C.
    rules
        (C, 5): threshold, min area, gate threshold, gate pixels, presence; see `cloudrt.masks.rule.Rule`.
    presence
        (M,): presence level of each map.
    first
        Position of the first map.
    most
        Number of bytes of the longest text that a map can have, plus 8: `columns_to_text` writes whole words.
    ends
        Output, (M,): position in `text` after the last byte of each map's text.
    work
        Work space of `work_size(W, H)` entries.
    text
        Output: at least `most` ASCII characters.
    """
    addresses, width, height = maps
    end = 0
    for m in range(first, len(addresses)):
        if len(text) - end < most:
            return m
        threshold, min_area, gate_threshold, gate_pixels, least_presence = rules[m % rules.shape[0]]
        if threshold < 255 and presence[m] >= least_presence and (gate_pixels == 0 or gate_threshold < 255):
            least, gate = np.uint8(threshold + 1), np.uint8(gate_threshold + 1)
            levels = carray(pointer(addresses[m]), (width, height), np.uint8)
            end += columns_to_text(levels, least, min_area, gate, gate_pixels, work, text[end:])
        ends[m] = end
    return len(addresses)
