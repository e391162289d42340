"""Writing runs as RLE text: one table look-up for a short number, two for a long one, 8 characters per store."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloudrt.kernels.bits import index, store_word, trailing_zeros
from cloudrt.kernels.jit import kernel

_PLACES = np.arange(10_000)[:, None] // np.array([1000, 100, 10, 1]) % 10
FOURS = (_PLACES + 48).astype(np.uint8).view("<u4").ravel().astype(np.uint32)
"""The four characters of 0000 to 9999, the first one in the lowest byte."""

SPACES = np.array([0] + [32 << 8 * (8 - zeros) for zeros in range(1, 8)], np.uint64)
"""A space in the byte after the digits of an 8-digit number, indexed by the number of leading zeros."""

SHORT = 1024
SHORTS = np.array([int.from_bytes(b"%d " % number, "little") for number in range(SHORT)], np.uint64)
"""The characters of 0 to 1023 and a space, the first one in the lowest byte. Most runs are shorter than 1024."""

SHORT_LENGTHS = np.array([len(f"{number} ") for number in range(SHORT)], np.int64)
"""The number of characters of each entry of `SHORTS`."""


@kernel
def _write_seven(text: NDArray[np.uint8], at: int, number: int) -> int:
    """Write a positive number of at most 7 digits and a space at `at`; return the position after them.

    Two look-ups give 8 digits; a shift removes the leading zeros. Always stores 8 bytes.
    """
    value = np.uint64(number)
    high = value // np.uint64(10_000)
    digits = np.uint64(FOURS[high]) | (np.uint64(FOURS[value - high * np.uint64(10_000)]) << np.uint64(32))
    zeros: int = trailing_zeros(digits & np.uint64(0x0F0F0F0F0F0F0F0F)) >> 3  # at least one
    store_word(text, at, (digits >> np.uint64(8 * zeros)) | SPACES[index(zeros)])
    return at + 9 - zeros


@kernel
def _write_any(text: NDArray[np.uint8], at: int, number: int) -> int:
    """Write a positive number and a space at `at`; return the position after them."""
    digits = 1
    power = 10
    while number >= power:
        power *= 10
        digits += 1
    for place in range(at + digits - 1, at - 1, -1):
        text[place] = 48 + number % 10
        number //= 10
    text[at + digits] = 32
    return at + digits + 1


@kernel
def write_runs(edges: NDArray[np.int32], count: int, text: NDArray[np.uint8]) -> int:
    """Write the RLE text of runs, merging those that touch; return its length in bytes.

    A run that ends at the bottom of a column and one that starts at the top of the next are one run of the text.

    Parameters
    ----------
    edges
        Start, stop, start, stop, ... ascending.
    count
        Number of runs.
    text
        Output; at least 8 bytes longer than the text.
    """
    seven = count == 0 or edges[2 * count - 1] < 10_000_000  # tested once: a test per number would halve the speed
    return _write_seven_digits(edges, count, text) if seven else _write_any_digits(edges, count, text)


@kernel
def _write_seven_digits(edges: NDArray[np.int32], count: int, text: NDArray[np.uint8]) -> int:
    at = 0
    run = 0
    while run < count:
        start = edges[index(2 * run)]
        stop = edges[index(2 * run + 1)]
        run += 1
        while run < count and edges[index(2 * run)] == stop:
            stop = edges[index(2 * run + 1)]
            run += 1
        at = _write_seven(text, at, start + 1)
        length = stop - start
        if length < SHORT:
            store_word(text, at, SHORTS[index(length)])
            at += SHORT_LENGTHS[index(length)]
        else:
            at = _write_seven(text, at, length)
    return max(at - 1, 0)


@kernel
def _write_any_digits(edges: NDArray[np.int32], count: int, text: NDArray[np.uint8]) -> int:
    at = 0
    run = 0
    while run < count:
        start = edges[2 * run]
        stop = edges[2 * run + 1]
        run += 1
        while run < count and edges[2 * run] == stop:
            stop = edges[2 * run + 1]
            run += 1
        at = _write_any(text, at, start + 1)
        at = _write_any(text, at, stop - start)
    return max(at - 1, 0)
