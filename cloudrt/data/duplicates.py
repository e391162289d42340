"""Groups of near-duplicate images, found by a perceptual hash."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

HASH = 8
"""Height and width of the hash, in bits."""
MAX_DISTANCE = 5
"""Largest number of differing bits, of 64, between near-duplicates."""


def difference_hash(image: NDArray[np.uint8]) -> int:
    """Return the 64-bit difference hash of an (H, W, 3) uint8 RGB image.

    A bit is set if a pixel of the 9x8 grey thumbnail is darker than its right neighbour (N. Krawetz, "Kind of Like
    That", 2013).
    """
    grey = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (HASH + 1, HASH), interpolation=cv2.INTER_AREA)
    bits = np.packbits(small[:, 1:] > small[:, :-1])
    return int.from_bytes(bits.tobytes(), "big")


def similar_groups(hashes: Sequence[int]) -> NDArray[np.int_]:
    """Return the group number of each hash, from 0; hashes that differ in at most `MAX_DISTANCE` bits share a group.

    The relation is transitive: groups with a pair of similar members are merged.
    """
    values = np.array(hashes, np.uint64)
    group = np.arange(len(values))
    for row, value in enumerate(values):
        joined = np.unique(group[row:][np.bitwise_count(values[row:] ^ value) <= MAX_DISTANCE])
        if len(joined) > 1:
            group[np.isin(group, joined)] = joined[0]
    numbers: NDArray[np.int_] = np.unique(group, return_inverse=True)[1]
    return numbers
