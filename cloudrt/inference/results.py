"""The result of segmenting one image: its rows, or the reason why it failed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import DataError
from cloudrt.labels import Labels
from cloudrt.masks.rle import rle_decode


@dataclass(frozen=True)
class Result:
    """The result for one image.

    Parameters
    ----------
    image
        Key of its rows: the key of an `ImageFile`, the path as given, or "image-0", "image-1" ... for bytes and arrays.
    rle
        Class name -> RLE text on the submission grid; all texts are empty if the image failed.
    error
        Reason of the failure, or None.
    labels
        Classes and grids.
    batch
        Position, among the inputs, of the first image of its batch, where a run can be resumed.
    batch_size
        Size of that batch; it is halved after running out of memory.
    """

    image: str
    rle: dict[str, str]
    error: str | None
    labels: Labels = field(repr=False)
    batch: int = field(default=0, repr=False)
    batch_size: int = field(default=0, repr=False)

    def mask(self, label: str) -> NDArray[np.uint8]:
        """Return the (H, W) uint8 mask, 0 or 1, of a class on the submission grid."""
        if label not in self.rle:
            raise DataError(f"no class named {label!r}: {', '.join(self.rle)}")
        return rle_decode(self.rle[label], self.labels.submit_grid)
