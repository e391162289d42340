"""Parsing and validation of RLE text, and painting or counting its runs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloudrt.kernels.jit import kernel

# Results of `parse_runs`.
OK = 0
NOT_A_NUMBER = 1
ODD_COUNT = 2
ZERO = 3
OVERLAP = 4
OUT_OF_BOUNDS = 5


@kernel
def parse_runs(  # noqa: PLR0911 - one return per rule
    text: NDArray[np.uint8], size: int, edges: NDArray[np.int64]
) -> tuple[int, int, int]:
    """Parse the runs of an RLE text.

    Parameters
    ----------
    text
        The bytes of the text.
    size
        Number of pixels of the mask.
    edges
        Output: start, stop, start, stop, ... with pixels counted from 0 and `stop` exclusive; at least
        `text.size // 2 + 1` entries.

    Returns
    -------
    tuple of int
        Number of runs; `OK` or the rule that is violated; the token that violates it, counted from 0.
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
        value = min(value * 10 + (byte - 48), size + 1)  # saturates instead of overflowing
    if token % 2 == 0:
        return 0, ODD_COUNT, token
    return (token + 1) // 2, OK, token


@kernel
def paint_runs(edges: NDArray[np.int64], count: int, flat: NDArray[np.uint8]) -> None:
    """Set the pixels of the runs to 1 in `flat`, (W * H,), a mask in RLE order."""
    for run in range(count):
        for pixel in range(edges[2 * run], edges[2 * run + 1]):
            flat[pixel] = 1


@kernel
def count_blocks(
    edges: NDArray[np.int64], count: int, height: int, block_height: int, block_width: int, counts: NDArray[np.int32]
) -> None:
    """Count the pixels that the runs cover in each block of the mask.

    Parameters
    ----------
    edges, count
        The runs; see `parse_runs`.
    height
        Height of the mask.
    block_height, block_width
        Size of a block; divides the mask.
    counts
        Output, added to: (W / block_width, H / block_height).
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
