"""What the pipeline says of an image: what the network gave, and the rows that came of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import DataError
from cloudrt.labels import Labels
from cloudrt.masks.rle import rle_decode


@dataclass(frozen=True)
class Result:
    """The answer for one image.

    Parameters
    ----------
    image
        The key of its rows: an `ImageFile`'s key, the path as given, or "image-0", "image-1" ... for bytes and arrays.
    rle
        Class name -> RLE text on the submission grid; all empty where the image failed.
    error
        Why it failed, or None.
    batch
        The position, among the inputs, of the first of its batch: where a run can be taken up again.
    batch_size
        The size of that batch, which halves where memory runs out.
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
