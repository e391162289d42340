"""The output of the network for one image, before any rule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Inferred:
    """What the network says of one image.

    Parameters
    ----------
    image
        The key of its rows; see `Result`.
    probability
        (C, W, H) uint8 levels 0..255 on the transposed submission grid; None where the image failed.
    presence
        (C,) uint8, where the artifact has that output and the image did not fail.
    error
        Why it failed, or None.
    batch, batch_size
        See `Result`.
    """

    image: str
    probability: NDArray[np.uint8] | None
    presence: NDArray[np.uint8] | None
    error: str | None
    batch: int = 0
    batch_size: int = 0
