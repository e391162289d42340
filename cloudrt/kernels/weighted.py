"""Addition of a weighted tile to the sums of a strip, and their division, in one pass without temporary arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloudrt.kernels.jit import kernel


@kernel
def add_weighted(
    levels: NDArray[np.uint8],
    present: NDArray[np.bool_],
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
    present
        (C,): the classes that are added to `total`.
    weights
        (W, H).
    row, rows
        Row of the strip where the tile begins, and the number of rows of the tile that are added.
    total
        (C, W, S), C-contiguous: the sums of the strip, which has S rows.
    weight
        (W, S): the sums of the weights.
    """
    classes, width = levels.shape[:2]
    for c in range(classes):
        if not present[c]:
            continue
        for x in range(width):
            tile, scale, into = levels[c, x, :rows], weights[x, :rows], total[c, x, row : row + rows]
            for y in range(rows):
                into[y] += np.float32(tile[y]) * scale[y]
    for x in range(width):
        scale, into = weights[x, :rows], weight[x, row : row + rows]
        for y in range(rows):
            into[y] += scale[y]


@kernel
def divide_weighted(total: NDArray[np.float32], weight: NDArray[np.float32], levels: NDArray[np.uint8]) -> None:
    """Write the weighted means, rounded half to even, to `levels`; 0 where the weight is 0.

    Parameters
    ----------
    total
        (C, W, S): sums of weighted levels 0..255.
    weight
        (W, S): sums of the weights.
    levels
        (C, W, S).
    """
    shift = np.float32(3 << 22)  # the sum with a number from 0 to 255 has no bits for a fraction
    tiny = np.float32(1.1754944e-38)
    for c in range(total.shape[0]):
        for x in range(total.shape[1]):
            row, scale, into = total[c, x], weight[x], levels[c, x]
            for y in range(total.shape[2]):
                into[y] = np.uint8((row[y] / max(scale[y], tiny) + shift) - shift)
