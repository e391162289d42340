"""From bits to runs, from runs to components, from components to text.

A mask is (W, words): the bits of each column, as `bits.pack` leaves them. A run is a stretch `[start, stop)` of one
column, in pixels of the whole mask counted in RLE order; `edges` holds start, stop, start, stop, ...; the runs of
column x are those numbered `first[x] ... first[x + 1] - 1`. A smooth mask of 184,000 pixels has some 500 runs: whatever
follows the bits is cheap because it works on runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloudrt.kernels import bits
from cloudrt.kernels.bits import BITS, ONE, store_word, trailing_zeros
from cloudrt.kernels.jit import kernel


@kernel
def find_runs(words: NDArray[np.uint64], height: int, edges: NDArray[np.int32], first: NDArray[np.int32]) -> int:
    """Write the runs of a mask; return how many there are.

    A pixel begins or ends a run where it differs from the one before it: the bits of a word and of the word shifted by
    one, exclusive or. `edges` holds at least 2 * W * ceil(H / 2) entries, `first` W + 1.
    """
    width, per_column = words.shape
    count = 0
    for x in range(width):
        first[x] = count >> 1
        carry = np.uint64(0)
        for w in range(per_column):
            word = words[x, w]
            changes = word ^ ((word << ONE) | carry)
            carry = word >> np.uint64(BITS - 1)
            begin = x * height + BITS * w
            while changes:
                edges[count] = begin + trailing_zeros(changes)
                count += 1
                changes &= changes - ONE
        if carry:
            edges[count] = (x + 1) * height
            count += 1
    first[width] = count >> 1
    return count >> 1


@kernel
def _root(parent: NDArray[np.int32], run: int) -> int:
    """Return the root of `run`, halving the path on the way (Tarjan & van Leeuwen, J. ACM 31(2), 1984)."""
    while parent[run] != run:
        parent[run] = parent[parent[run]]
        run = parent[run]
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
        right, right_end = first[x], first[x + 1]
        while left < left_end and right < right_end:
            left_stop = edges[2 * left + 1] + height  # in the pixels of the column to its right
            right_stop = edges[2 * right + 1]
            if edges[2 * left] + height <= right_stop and edges[2 * right] <= left_stop:
                a, b = _root(parent, left), _root(parent, right)
                parent[max(a, b)] = min(a, b)
            if left_stop < right_stop:
                left += 1
            else:
                right += 1
    for run in range(count):
        root = parent[parent[run]]
        parent[run] = root
        area[root] += edges[2 * run + 1] - edges[2 * run]


@kernel
def keep_runs(
    edges: NDArray[np.int32], count: int, parent: NDArray[np.int32], area: NDArray[np.int32], min_area: int
) -> int:
    """Move the runs of components larger than `min_area` to the front of `edges`; return how many there are."""
    kept = 0
    for run in range(count):
        if area[parent[run]] > min_area:
            edges[2 * kept] = edges[2 * run]
            edges[2 * kept + 1] = edges[2 * run + 1]
            kept += 1
    return kept


_PLACES = np.arange(10_000)[:, None] // np.array([1000, 100, 10, 1]) % 10
DIGITS = (_PLACES + 48).astype(np.uint8).view("<u4").ravel().astype(np.uint64)
"""The four characters of 0000 ... 9999, the first one lowest."""

SPACES = np.array([0] + [32 << 8 * (8 - zeros) for zeros in range(1, 8)], np.uint64)
"""A space in the byte after the digits of an 8-digit number, by the number of zeros in front of them."""


@kernel
def _write_seven(text: NDArray[np.uint8], at: int, number: int) -> int:
    """Write a positive number of at most 7 digits and a space at `at`; return where they end. Writes 8 bytes.

    Two look-ups make 8 digits; a shift drops the zeros in front.
    """
    value = np.uint64(number)
    high = value // np.uint64(10_000)
    digits = DIGITS[np.int64(high)] | (DIGITS[np.int64(value - high * np.uint64(10_000))] << np.uint64(32))
    zeros: int = trailing_zeros(digits & np.uint64(0x0F0F0F0F0F0F0F0F)) >> 3  # at least one: the eighth digit
    store_word(text, at, (digits >> np.uint64(8 * zeros)) | SPACES[zeros])
    return at + 9 - zeros


@kernel
def _write_number(text: NDArray[np.uint8], at: int, number: int) -> int:
    """Write a positive number below 10^14 and a space at `at`; return where they end."""
    if number >= 10_000_000:
        at = _write_seven(text, at, number // 10_000_000) - 1  # the next digit takes the place of the space
        number %= 10_000_000
        for place in range(at + 6, at - 1, -1):
            text[place] = 48 + number % 10
            number //= 10
        text[at + 7] = 32
        return at + 8
    return _write_seven(text, at, number)


@kernel
def write_runs(edges: NDArray[np.int32], count: int, text: NDArray[np.uint8]) -> int:
    """Write the RLE text of the runs, those that touch as one; return its length in bytes.

    A run that reaches the bottom of its column and one that begins at the top of the next are one run of the text.
    """
    at = 0
    run = 0
    while run < count:
        start = edges[2 * run]
        stop = edges[2 * run + 1]
        run += 1
        while run < count and edges[2 * run] == stop:
            stop = edges[2 * run + 1]
            run += 1
        at = _write_number(text, at, start + 1)
        at = _write_number(text, at, stop - start)
    return max(at - 1, 0)


@kernel
def map_to_text(
    lines: NDArray[Any],
    by_columns: bool,
    least: Any,
    min_area: int,
    gate: Any,
    gate_pixels: int,
    words: NDArray[np.uint64],
    columns: NDArray[np.uint64],
    edges: NDArray[np.int32],
    first: NDArray[np.int32],
    parent: NDArray[np.int32],
    area: NDArray[np.int32],
    text: NDArray[np.uint8],
) -> int:
    """Write the RLE text of one map, whose lines are its columns or its rows; return its length in bytes.

    A pixel is on where it is at least `least`; the map is empty where fewer than `gate_pixels` are at least `gate`.
    `words` is (lines, ceil(length / 64)); `columns` is (W, ceil(H / 64)), the same array where the lines are columns.
    """
    height = lines.shape[1] if by_columns else lines.shape[0]
    width = lines.shape[0] if by_columns else lines.shape[1]
    if gate_pixels > 0:
        if bits.pack_and_count(lines, least, gate, words) < gate_pixels:
            return 0
    else:
        bits.pack(lines, least, words)
    if not by_columns:
        bits.transpose(words, height, width, columns)
    count = find_runs(columns, height, edges, first)
    if min_area > 0 and count:
        join_runs(edges, first, width, height, parent, area)
        count = keep_runs(edges, count, parent, area, min_area)
    return write_runs(edges, count, text)


@kernel
def image_to_texts(
    levels: NDArray[np.uint8],
    rules: NDArray[np.int64],
    presence: NDArray[np.uint8],
    ends: NDArray[np.int64],
    words: NDArray[np.uint64],
    edges: NDArray[np.int32],
    first: NDArray[np.int32],
    parent: NDArray[np.int32],
    area: NDArray[np.int32],
    text: NDArray[np.uint8],
) -> None:
    """Write the RLE texts of the maps of one image, (C, W, H), one after the other; `ends[c]` is where each ends.

    `rules` is (C, 5): threshold, min area, gate threshold, gate pixels, presence; `presence` is (C,).
    """
    end = 0
    for c in range(levels.shape[0]):
        threshold, min_area, gate_threshold, gate_pixels, least_presence = rules[c]
        if threshold < 255 and presence[c] >= least_presence and (gate_pixels == 0 or gate_threshold < 255):
            end += map_to_text(
                levels[c], True, np.uint8(threshold + 1), min_area, np.uint8(gate_threshold + 1), gate_pixels,
                words, words, edges, first, parent, area, text[end:],
            )  # fmt: skip
        ends[c] = end
