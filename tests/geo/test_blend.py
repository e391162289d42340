"""Blending of overlapping tiles, compared with NumPy."""

from __future__ import annotations

import numpy as np

from cloudrt.geo.blend import Blend, tile_weights


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
