"""Addition of a weighted tile to the sums of a strip, in one pass without temporary arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloudrt.kernels.jit import kernel


@kernel
def add_weighted(
    levels: NDArray[np.uint8],
    weights: NDArray[np.float32],
    row: int,
    rows: int,
    total: NDArray[np.float32],
    weight: NDArray[np.float32],
) -> None:
    """Add the first rows of a tile, times their weights, to `total`, and the weights to `weight`.

    Parameters
    ----------
    levels
        (C, W, H): the tile, C-contiguous.
    weights
        (W, H).
    row, rows
        First row of the tile in the strip, and the number of its rows that are added.
    total
        (C, W, S), C-contiguous: the sums of the strip.
    weight
        (W, S): the sums of the weights.
    """
    classes, width = levels.shape[:2]
    for c in range(classes):
        for x in range(width):
            tile, scale, into = levels[c, x, :rows], weights[x, :rows], total[c, x, row : row + rows]
            for y in range(rows):
                into[y] += np.float32(tile[y]) * scale[y]
    for x in range(width):
        scale, into = weights[x, :rows], weight[x, row : row + rows]
        for y in range(rows):
            into[y] += scale[y]
