"""Reading RLE text: digits to runs, every rule checked on the way, nothing ever read or written out of bounds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloudrt.kernels.jit import kernel

OK = 0
NOT_A_NUMBER = 1
ODD_COUNT = 2
ZERO = 3
OVERLAP = 4
OUT_OF_BOUNDS = 5


@kernel
def parse_runs(  # noqa: PLR0911 - a return for each rule
    text: NDArray[np.uint8], size: int, edges: NDArray[np.int64]
) -> tuple[int, int, int]:
    """Write start, stop, start, stop, ... of the runs of `text`; return (how many, what is wrong, at which token).

    Pixels and tokens count from 0; a run is `[start, stop)` of a mask of `size` pixels in RLE order. `edges` holds an
    entry for each two bytes of text, and one more.
    """
    token = -1
    value = 0
    inside = False
    start = 0
    end = 0
    for i in range(text.size + 1):
        byte = text[i] if i < text.size else 32
        if byte in (32, 9, 10, 13):
            if not inside:
                continue
            inside = False
            if value == 0:
                return 0, ZERO, token
            if token % 2 == 0:
                if value > size:
                    return 0, OUT_OF_BOUNDS, token
                if value - 1 < end:
                    return 0, OVERLAP, token
                start = value - 1
            else:
                if value > size - start:
                    return 0, OUT_OF_BOUNDS, token
                end = start + value
                edges[token - 1] = start
                edges[token] = end
            continue
        if not inside:
            token += 1
            value = 0
            inside = True
        if byte < 48 or byte > 57:
            return 0, NOT_A_NUMBER, token
        value = min(value * 10 + (byte - 48), size + 1)  # past the end is past the end: no overflow
    if token % 2 == 0:
        return 0, ODD_COUNT, token
    return (token + 1) // 2, OK, token


@kernel
def paint_runs(edges: NDArray[np.int64], count: int, flat: NDArray[np.uint8]) -> None:
    """Set the runs to 1 in `flat`, a mask in RLE order."""
    for run in range(count):
        for pixel in range(edges[2 * run], edges[2 * run + 1]):
            flat[pixel] = 1


@kernel
def count_blocks(
    edges: NDArray[np.int64], count: int, height: int, block_height: int, block_width: int, counts: NDArray[np.int32]
) -> None:
    """Add to `counts`, (W / block_width, H / block_height), how many pixels of each block the runs hold.

    The runs are those of an (H, W) mask, of which `height` is H.
    """
    for run in range(count):
        at = edges[2 * run]
        while at < edges[2 * run + 1]:
            x = at // height
            y = at - x * height
            stop = min(edges[2 * run + 1] - x * height, height)
            at = x * height + stop
            column = counts[x // block_width]
            first = y // block_height
            last = (stop - 1) // block_height
            if first == last:
                column[first] += stop - y
                continue
            column[first] += (first + 1) * block_height - y
            for block in range(first + 1, last):
                column[block] += block_height
            column[last] += stop - last * block_height
