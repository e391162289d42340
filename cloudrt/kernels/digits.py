"""Writing runs as RLE text: four digits a look-up, eight characters a store."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloudrt.kernels.bits import store_word, trailing_zeros
from cloudrt.kernels.jit import kernel

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
