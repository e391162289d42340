"""The output of the network for one image, before post-processing."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Inferred:
    """The network's output for one image.

    Parameters
    ----------
    image
        Key of the image's rows; see `cloudrt.inference.results.Result`.
    probability
        (C, W, H) uint8 levels 0..255 on the transposed submission grid; None if the image failed.
    presence
        (C,) uint8 levels 0..255; None if the artifact has no such output, or the image failed.
    error
        Reason of the failure, or None.
    batch, batch_size
        See `Result`.
    """

    image: str
    probability: NDArray[np.uint8] | None = field(repr=False)
    presence: NDArray[np.uint8] | None
    error: str | None
    batch: int = field(default=0, repr=False)
    batch_size: int = field(default=0, repr=False)
