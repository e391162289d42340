"""Choice of the held-out images: a random share, or stratified folds that can keep similar images together."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from cloudrt.data.duplicates import difference_hash, similar_groups
from cloudrt.errors import DataError

from .cache import DatasetCache


def split(cache: DatasetCache, share: float, seed: int) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """Return the positions of the training and of the held-out images, by a seeded shuffle of the readable ones.

    Raises
    ------
    DataError
        No image would be left to train on.
    """
    order = np.random.default_rng(seed).permutation(readable(cache))
    held_out = max(1, round(len(order) * share))
    if len(order) - held_out < 1:
        raise DataError(f"{len(order)} images and a validation share of {share} leave none to train on")
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def split_listed(cache: DatasetCache, held_out: Collection[str]) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """Return the positions of the training and of the held-out images, which are those named in `held_out`.

    Raises
    ------
    DataError
        No image would be left to train on, or none is held out.
    """
    positions = readable(cache)
    held = np.array([cache.names[position] in held_out for position in positions], bool)
    if held.all() or not held.any():
        raise DataError(f"{held.sum()} of {len(positions)} images would be held out: both parts need at least one")
    return positions[~held], positions[held]


def folds(
    cache: DatasetCache, count: int, seed: int, group_similar: bool = False, excluded: Collection[str] = ()
) -> list[NDArray[np.int_]]:
    """Return the positions of each fold; every readable image that is not named in `excluded` is in exactly one.

    Images are stratified by their combination of classes. With `group_similar`, images of one group of
    `similar_groups` are in the same fold.

    Raises
    ------
    DataError
        There are fewer images, or groups, than folds, or a fold would be empty.
    """
    import warnings

    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    positions = np.array([one for one in readable(cache) if cache.names[one] not in excluded], int)
    if len(positions) < count:
        rest = " that are not held out" if excluded else ""
        raise DataError(f"{count} folds need at least {count} different images{rest}, found {len(positions)}")
    present = np.array([[bits.any() for bits in cache.truth[position]] for position in positions])
    _, combination, counts = np.unique(present[:, ::-1], axis=0, return_inverse=True, return_counts=True)
    groups = np.arange(len(positions))
    if group_similar:
        groups = similar_groups([difference_hash(cache.images[position]) for position in positions])
    if len(np.unique(groups)) < count:
        raise DataError(f"{count} folds need at least {count} different images, found {len(np.unique(groups))}")
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    if counts.max() < count:  # no combination occurs in every fold
        splitter = GroupKFold(count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about combinations that occur in some folds only
        parts = [np.sort(positions[held]) for _, held in splitter.split(positions, combination, groups)]
    if any(not len(part) for part in parts):
        raise DataError(f"{count} folds leave one empty: use fewer")
    return parts


def readable(cache: DatasetCache) -> NDArray[np.int_]:
    """Return the positions of the readable images."""
    return np.array([position for position, name in enumerate(cache.names) if name not in cache.failures], int)
