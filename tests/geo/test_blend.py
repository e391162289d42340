"""Blending of overlapping tiles, compared with NumPy."""

from __future__ import annotations

import numpy as np

from cloudrt.geo.blend import Blend, tile_weights
from cloudrt.kernels.weighted import add_weighted, divide_weighted


def test_a_panorama_around_the_earth_is_blended_without_a_seam() -> None:
    """Tiles that reach beyond the last column continue in the first."""
    random = np.random.default_rng(0)
    width, tile, count = 60, 16, 6
    levels = random.integers(0, 256, (count, 2, tile, 9), dtype=np.uint8)
    weights = tile_weights((9, tile), 0.4).astype(float)
    total, weight = np.zeros((2, width, 9)), np.zeros((width, 9))
    blend = Blend((9, width), (9, tile), 2, 0.4, beyond=50 + tile - width)
    for k in range(count):
        columns = (10 * k + np.arange(tile)) % width
        total[:, columns] += levels[k] * weights
        weight[columns] += weights
        blend.add(levels[k], 10 * k, 0)
    exact = total / weight
    assert np.abs(blend.finish() - exact).max() <= 0.5 + 1e-4


def test_the_kernel_adds_like_numpy() -> None:
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
