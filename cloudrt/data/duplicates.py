"""Images that look nearly alike, found by a hash of their coarse brightness."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

HASH = 8
"""Sides of the thumbnail that an image is known by."""
TWINS = 5
"""Bits of the hash, of 64, in which two images may differ to count as the same scene."""


def difference_hash(image: NDArray[np.uint8]) -> int:
    """Return the 64 bits of an (H, W, 3) uint8 RGB image: which cells of a thumbnail are darker than the one on their
    right (N. Krawetz, "Kind of like that", 2013).
    """
    grey = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (HASH + 1, HASH), interpolation=cv2.INTER_AREA)
    bits = np.packbits(small[:, 1:] > small[:, :-1])
    return int.from_bytes(bits.tobytes(), "big")


def similar_groups(hashes: Sequence[int]) -> NDArray[np.int_]:
    """Return a group number, from 0, for each hash: those that differ in at most `TWINS` bits share it.

    Groups are joined through their members.
    """
    values = np.array(hashes, np.uint64)
    group = np.arange(len(values))
    for row, value in enumerate(values):
        joined = np.unique(group[row:][np.bitwise_count(values[row:] ^ value) <= TWINS])
        if len(joined) > 1:
            group[np.isin(group, joined)] = joined[0]
    numbers: NDArray[np.int_] = np.unique(group, return_inverse=True)[1]
    return numbers
