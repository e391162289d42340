"""Components of a panorama's mask, compared with scipy, and their mean probabilities."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from cloudrt.geo.components import keep_components, label
from cloudrt.masks.rle import rle_decode
from cloudrt.masks.rule import Rule


@pytest.mark.parametrize("wraps", [False, True])
def test_components_are_those_of_scipy(wraps: bool) -> None:
    random = np.random.default_rng(1)
    for share in (0.1, 0.35, 0.6):
        mask = (random.random((40, 70)) < share).astype(np.uint8)
        found, count = label(mask, wraps)
        numbers, _ = ndimage.label(mask, np.ones((3, 3)))
        if wraps:  # join components across the last and the first column, pair by pair
            for row in range(40):
                for other in range(max(row - 1, 0), min(row + 2, 40)):
                    if numbers[row, -1] and numbers[other, 0]:
                        numbers[numbers == numbers[other, 0]] = numbers[row, -1]
        pairs = set(zip(found.ravel().tolist(), numbers.ravel().tolist(), strict=True))
        assert count == len(np.unique(found)) - 1
        assert (0, 0) in pairs and len(pairs) == len(np.unique(numbers)) == count + 1
        levels = np.ascontiguousarray((mask * random.integers(101, 256, mask.shape, np.uint8)).T)
        text, means = keep_components(levels, Rule(100, 6), wraps)
        kept = rle_decode(text, mask.shape)
        areas = np.bincount(found.ravel())
        assert (kept == ((areas > 6) & (np.arange(len(areas)) > 0))[found]).all()
        big = [number for number in range(1, len(areas)) if areas[number] > 6]
        assert means == tuple(round(float(levels.T[found == number].mean()) / 255, 4) for number in big)
        again, _ = label(kept, wraps)
        order = [found[again == number][0] for number in range(1, again.max() + 1)]
        assert order == sorted(order)  # the means are stored in this order
