"""Weighted sums of tiles, compared with NumPy."""

from __future__ import annotations

import numpy as np

from cloudrt.kernels.weighted import add_weighted, divide_weighted


def test_tiles_are_added_and_divided_as_by_numpy() -> None:
    random = np.random.default_rng(0)
    levels = random.integers(0, 256, (3, 21, 35), dtype=np.uint8)
    weights = random.random((21, 35), np.float32)
    total, weight = random.random((3, 21, 90), np.float32), random.random((21, 90), np.float32)
    for row, rows in ((0, 35), (40, 35), (60, 30), (89, 1)):
        exact, exact_weight = total.copy(), weight.copy()
        exact[::2, :, row : row + rows] += levels[::2, :, :rows] * weights[:, :rows]
        exact_weight[:, row : row + rows] += weights[:, :rows]
        add_weighted(levels, np.array([True, False, True]), weights, row, rows, total, weight)
        assert (total == exact).all() and (weight == exact_weight).all()
    weight[3, 7] = 0
    total[:, 3, 7] = 0
    weight[4:] = 2
    total[:, 4:] = random.integers(0, 511, total[:, 4:].shape)  # halves are rounded to even
    found = np.full(total.shape, 9, np.uint8)
    divide_weighted(total, weight, found)
    assert (found == np.rint(total / np.maximum(weight, np.finfo(np.float32).tiny)).astype(np.uint8)).all()
