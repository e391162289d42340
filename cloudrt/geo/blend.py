"""Blending the probabilities of overlapping tiles, from left to right, in a strip as wide as a tile.

Each tile is multiplied by weights that decrease linearly towards its edges, and the sum is divided by the sum of the
weights. Columns left of the current tiles are finished, and stored as levels; the sums are kept for one strip. Where
the panorama goes around the Earth, the sums of the first columns are also kept, until the last tiles have reached them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloudrt.labels import Grid

Floats = NDArray[np.float32]


def tile_weights(size: Grid, overlap: float) -> Floats:
    """Return the weights of a tile, (W, H) float32: at most 1, decreasing towards its edges over the overlap."""
    height, width = size
    return np.outer(_ramp(width, overlap), _ramp(height, overlap)).astype(np.float32)


def _ramp(length: int, overlap: float) -> NDArray[np.float64]:
    middles = np.arange(length) + 0.5
    ramp = max(1.0, overlap * length)
    return np.asarray(np.minimum(np.minimum(middles, length - middles) / ramp, 1))


class Blend:
    """Blends the tiles of one panorama, which are added column by column.

    Parameters
    ----------
    grid
        Height and width of the panorama's grid.
    tile
        Height and width of a tile on this grid.
    classes
        Number of classes.
    overlap
        Fraction of a tile over which its weights decrease.
    beyond
        For a panorama that goes around the Earth: the number of columns by which the last tiles extend beyond the last
        column, onto the first columns. None for other panoramas.
    """

    def __init__(self, grid: Grid, tile: Grid, classes: int, overlap: float, beyond: int | None = None) -> None:
        from cloudrt.kernels import weighted  # importing numba takes about a second

        self._kernels = weighted
        height, width = grid
        self.levels = np.zeros((classes, width, height), np.uint8)
        self._weights = tile_weights(tile, overlap)
        self._sum = np.zeros((classes, tile[1], height), np.float32)
        self._weight = np.zeros((tile[1], height), np.float32)
        self._begin = 0
        self._beyond = beyond or 0
        self._first_sum = np.zeros((classes, self._beyond, height), np.float32)
        self._first_weight = np.zeros((self._beyond, height), np.float32)

    def add(self, levels: NDArray[np.uint8], x: int, y: int, present: NDArray[np.bool_] | None = None) -> None:
        """Add a tile, (C, W, H) levels, whose first pixel is column `x` and row `y`; `x` never decreases.

        Classes that are not `present`, (C,), count as level 0. None: all are present.
        """
        self._finish_until(x)
        if present is None:
            present = np.ones(len(levels), np.bool_)
        rows = min(levels.shape[2], self._sum.shape[2] - y)
        tile = np.ascontiguousarray(levels)
        self._kernels.add_weighted(tile, present, self._weights, y, rows, self._sum, self._weight)

    def finish(self) -> NDArray[np.uint8]:
        """Return the levels of the panorama, (C, W, H), after the last tile."""
        self._finish_until(self._begin + self._sum.shape[1])
        self._kernels.divide_weighted(self._first_sum, self._first_weight, self.levels[:, : self._beyond])
        return self.levels

    def _finish_until(self, x: int) -> None:
        """Store the levels of the columns left of `x`, and move the strip there."""
        done = min(x - self._begin, self._sum.shape[1])
        if done <= 0:
            return
        begin, width = self._begin, self.levels.shape[1]
        first = max(0, min(self._beyond - begin, done))
        last = max(first, min(width - begin, done))
        self._first_sum[:, begin : begin + first] += self._sum[:, :first]
        self._first_weight[begin : begin + first] += self._weight[:first]
        part = self.levels[:, begin + first : begin + last]
        self._kernels.divide_weighted(self._sum[:, first:last], self._weight[first:last], part)
        rest = min(begin + done - width, self._beyond) if begin + done > width else 0
        if rest > 0:  # around the Earth
            at = max(begin - width, 0)
            some = slice(width + at - begin, width + rest - begin)
            self._first_sum[:, at:rest] += self._sum[:, some]
            self._first_weight[at:rest] += self._weight[some]
        for array in (self._sum.swapaxes(0, 1), self._weight):
            array[: len(array) - done] = array[done:].copy()
            array[len(array) - done :] = 0
        self._begin = x
