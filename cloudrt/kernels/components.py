"""Passes over the labelled pixels of a panorama."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloudrt.kernels.jit import kernel


@kernel
def sum_levels(labels: NDArray[np.int32], levels: NDArray[np.uint8], sums: NDArray[np.int64]) -> None:
    """Add the level of each pixel to the sum of its component.

    Parameters
    ----------
    labels, levels
        (W, H), C-contiguous.
    sums
        (n,): one for each label; that of label 0 is not changed.
    """
    for x in range(labels.shape[0]):
        for y in range(labels.shape[1]):
            label = labels[x, y]
            if label:
                sums[label] += levels[x, y]


@kernel
def select(labels: NDArray[np.int32], keep: NDArray[np.uint8], mask: NDArray[np.uint8]) -> None:
    """Write 1 to `mask` where the label of a pixel is kept, else 0.

    Parameters
    ----------
    labels
        (W, H), C-contiguous.
    keep
        (n,): 0 or 1 for each label.
    mask
        (W, H), C-contiguous.
    """
    for x in range(labels.shape[0]):
        for y in range(labels.shape[1]):
            mask[x, y] = keep[labels[x, y]]
