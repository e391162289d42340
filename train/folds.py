"""Which images to hold out: a seeded share, or folds that hold the classes in equal parts and keep twins together."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import DataError

from .cache import DatasetCache

HASH = 8
"""Sides of the thumbnail that an image is known by."""
TWINS = 5
"""Bits of the hash, of 64, in which two images may differ to count as the same scene."""


def split(cache: DatasetCache, share: float, seed: int) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """Return the positions to train on and to hold out: a seeded shuffle of the readable images.

    Raises
    ------
    DataError
        None would be left to train on.
    """
    order = np.random.default_rng(seed).permutation(readable(cache))
    held_out = max(1, round(len(order) * share))
    if len(order) - held_out < 1:
        raise DataError(f"{len(order)} images and a validation share of {share} leave none to train on")
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def folds(cache: DatasetCache, count: int, seed: int, group_similar: bool = False) -> list[NDArray[np.int_]]:
    """Return the positions of each fold: every readable image is in one.

    Images are stratified by their set of classes, so that each fold has each combination in its share; with
    `group_similar`, images of `similar_groups` are in the same fold.

    Raises
    ------
    DataError
        Fewer images, or groups, than folds.
    """
    import warnings

    from sklearn.model_selection import StratifiedGroupKFold

    positions = readable(cache)
    present = np.array([[bits.any() for bits in cache.truth[position]] for position in positions])
    combination = present @ (1 << np.arange(present.shape[1]))
    groups = similar_groups(cache, positions) if group_similar else np.arange(len(positions))
    if len(np.unique(groups)) < count:
        raise DataError(f"{count} folds need as many images that differ, found {len(np.unique(groups))}")
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a combination rarer than the folds cannot be in each
        parts = [np.sort(positions[held]) for _, held in splitter.split(positions, combination, groups)]
    if any(not len(part) for part in parts):
        raise DataError(f"{count} folds leave one empty: take fewer")
    return parts


def similar_groups(cache: DatasetCache, positions: NDArray[np.int_]) -> NDArray[np.int_]:
    """Return a group number for each position: images whose hashes differ in at most `TWINS` bits share it.

    The hash is the difference hash: whether each cell of a small thumbnail is darker than the one to its right
    (N. Krawetz, "Kind of like that", 2013). Groups are joined through their members.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    hashes = np.array([difference_hash(cache.images[position]) for position in positions], np.uint64)
    pairs = [
        (row, column)
        for row, one in enumerate(hashes)
        for column in np.flatnonzero(np.bitwise_count(hashes[row + 1 :] ^ one) <= TWINS) + row + 1
    ]
    rows, columns = np.array(pairs, int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), shape=(len(hashes), len(hashes)))
    groups: NDArray[np.int_] = connected_components(graph, directed=False)[1]
    return groups


def difference_hash(image: NDArray[np.uint8]) -> int:
    """Return the 64 bits of an (H, W, 3) uint8 RGB image's difference hash."""
    import cv2

    grey = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (HASH + 1, HASH), interpolation=cv2.INTER_AREA)
    bits = np.packbits(small[:, 1:] > small[:, :-1])
    return int.from_bytes(bits.tobytes(), "big")


def readable(cache: DatasetCache) -> NDArray[np.int_]:
    """Return the positions of the images that could be read."""
    return np.array([position for position, name in enumerate(cache.names) if name not in cache.failures], int)
