"""The result of segmenting one image: its rows, or the reason why it failed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.arguments import check_grid, check_path, check_type
from cloudrt.errors import DataError
from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.images.headers import MAX_PIXELS
from cloudrt.images.image import SUFFIXES, Image, decode, load_image, read_file
from cloudrt.labels import Grid, Labels
from cloudrt.masks.rle import rle_area, rle_decode
from cloudrt.system.files import replacing
from cloudrt.system.suggest import check_name

if TYPE_CHECKING:
    import pandas as pd


@dataclass(slots=True, repr=False)
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
        Position, among the inputs, of the first image of its batch, where a run can be resumed. For a panorama, the
        position of the last panorama whose first tile begins a batch.
    batch_size
        Size of that batch; it is halved after running out of memory.
    source
        Path of the file, or height and width of the array; None for bytes, images in stores and images that were cut
        into tiles.
    probability
        (C, H, W) uint8 levels 0..255 on the submission grid, with `Segmenter.predict(..., probabilities=True)`.
    place
        Grid and position of a panorama's masks; None for an image that was not cut into tiles.
    max_pixels
        Limit of the run, which also applies when the file is read again; see `RunOptions`.
    """

    image: str
    rle: dict[str, str]
    error: str | None
    labels: Labels = field(repr=False)
    batch: int = field(default=0, repr=False)
    batch_size: int = field(default=0, repr=False)
    place: MaskGrid | None = field(default=None, repr=False)
    source: str | Path | Grid | None = field(default=None, repr=False, compare=False)
    probability: NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)
    max_pixels: int = field(default=MAX_PIXELS, repr=False, compare=False)

    def __repr__(self) -> str:
        if self.error is not None:
            return f"Result({self.image!r}, error={self.error!r})"
        areas = ", ".join(f"{label} {area:,}" for label, area in self.areas().items() if area)
        return f"Result({self.image!r}, {areas + ' pixels' if areas else 'no masks'})"

    def areas(self) -> dict[str, int]:
        """Return the number of pixels of each class on the submission grid."""
        return {label: rle_area(text) for label, text in self.rle.items()}

    def mask(self, label: str, size: str | Grid = "grid") -> NDArray[np.uint8]:
        """Return the mask of a class.

        Parameters
        ----------
        label
            Name of the class.
        size
            "grid": the submission grid. "image": the size of the image. (H, W): this size. The mask is resized with
            nearest-neighbour interpolation.

        Returns
        -------
        numpy.ndarray
            (H, W) uint8, 0 or 1.

        Raises
        ------
        DataError
            No class of that name, an invalid size, or "image" where `source` is None.
        ImageError
            The file of the image can no longer be read.
        """
        check_name("class", label, tuple(self.rle))
        mask = rle_decode(self.rle[label], self.labels.submit_grid)
        if isinstance(size, str) and size == "grid":
            return mask
        if isinstance(size, str) and size == "image":
            if self.source is None:
                raise DataError(f'the size of {self.image} is not known: give size=(height, width) instead of "image"')
            if isinstance(self.source, str | Path):
                size = decode(read_file(self.source), max_pixels=self.max_pixels).shape[:2]
            else:
                size = self.source
        height, width = check_grid('size must be "grid", "image" or (height, width): it', size, least=1)
        return np.asarray(cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)

    def plot(self, image: Image | None = None) -> Image:
        """Return the image on the submission grid, with the mask of each class in its colour.

        Parameters
        ----------
        image
            (H, W, 3) uint8 RGB. None reads the file; required if `source` is not a path.

        Returns
        -------
        numpy.ndarray
            (H, W, 3) uint8 RGB.

        Raises
        ------
        DataError
            `image` is required, or the image failed.
        ImageError
            The file of the image can no longer be read, or `image` has a wrong shape or dtype.
        """
        from cloudrt.inference.pictures import draw_masks

        if self.error is not None:
            raise DataError(f"{self.image} {self.error}: there is nothing to draw")
        source = self.source if image is None else image
        if not isinstance(source, str | Path | np.ndarray):
            raise DataError(f"{self.image} is not a file: give its pixels, plot(image)")
        pixels = load_image(source, self.labels.submit_grid, self.max_pixels)
        return draw_masks(pixels, list(self.rle.values()), self.labels)

    def save(self, path: str | Path, image: Image | None = None) -> None:
        """Write `plot(image)` to a file whose suffix decides the format, such as .jpg or .png.

        Raises
        ------
        DataError, ImageError
            See `plot`; or the suffix of an unsupported format.
        OSError
            The file cannot be written.
        """
        check_path("path", path)
        if Path(path).suffix.lower() not in SUFFIXES:
            raise DataError(f"{path}: the suffix decides the format: {', '.join(sorted(SUFFIXES))}")
        _, content = cv2.imencode(Path(path).suffix, self.plot(image)[..., ::-1])
        with replacing(path) as partial:
            partial.write_bytes(content.tobytes())


def to_dataframe(results: Result | Iterable[Result]) -> pd.DataFrame:
    """Return a table of one or several results: a row for each image and class.

    Returns
    -------
    pandas.DataFrame
        `image`, `class`, `rle`: the text on the submission grid; `pixels`: the area of the mask on it; `error`: the
        reason if the image failed, else None.

    Raises
    ------
    DataError
        `results` is not a `Result` or an iterable of them.
    """
    import pandas as pd

    several = [results] if isinstance(results, Result) else results
    check_type("results", several, Iterable, "a Result or several")
    several = list(several)
    for one in several:
        check_type("results", one, Result, "a Result or several")
    rows = [
        (result.image, label, result.rle[label], area, result.error)
        for result in several
        for label, area in result.areas().items()
    ]
    return pd.DataFrame(rows, columns=["image", "class", "rle", "pixels", "error"])
