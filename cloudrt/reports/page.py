"""Parts shared by all HTML pages: rendering of templates, class colours, images with outlined masks.

Each page is a single file without external resources.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import ImageError
from cloudrt.images.headers import MAX_PIXELS
from cloudrt.images.image import load_image
from cloudrt.images.resize import display_size
from cloudrt.labels import Grid, Labels, class_colours
from cloudrt.masks.rle import rle_decode
from cloudrt.system.files import replacing
from cloudrt.system.versions import VERSION

# (largest number of images on a page, longer side of each in pixels): all images are embedded in one file, so pages
# with more images have smaller ones.
_SIDES = ((100, 700), (1_000, 400))
_SMALLEST_SIDE = 256
_JPEG_QUALITY = 82

# Dash patterns, so that outlines differ in more than colour.
DASHES = ("none", "9 4", "2.5 3.5", "10 3 2.5 3")


@dataclass(frozen=True)
class Outline:
    """The outline of a mask.

    Parameters
    ----------
    index
        Index of the class.
    share
        Fraction of the grid that the mask covers.
    path
        Path data of SVG, in pixels of the grid.
    label
        Position of the class name, (x, y).
    """

    index: int
    share: float
    path: str
    label: tuple[float, float]


@dataclass(frozen=True)
class Card:
    """An image with outlines, ready for the template.

    Parameters
    ----------
    key
        Caption.
    picture
        Data URI, or None.
    note
        Why there is no picture.
    outlines
        Masks of the image.
    grid
        Height and width of the masks.
    wide
        Whether it is a panorama, which is shown as wide as the page.
    """

    key: str
    picture: str | None
    note: str
    outlines: list[Outline]
    grid: Grid
    wide: bool = False

    @property
    def min_width(self) -> int:
        """Width in CSS pixels below which a panorama is scrolled."""
        return max(_LEAST_WIDTH, round(_LEAST_HEIGHT * self.grid[1] / self.grid[0]))

    @property
    def line_scale(self) -> float:
        """Factor for line widths and font sizes in grid pixels, so that they look as large as on other cards."""
        return max(self.grid) / 525 * _CARD_WIDTH / max(_PAGE_WIDTH, self.min_width)


_CARD_WIDTH, _PAGE_WIDTH = 400, 1260
"""Widths, in CSS pixels, of a card and of a panorama on a large screen."""
_LEAST_WIDTH, _LEAST_HEIGHT = 860, 100


def write_page(path: Path, template: str, labels: Labels, **values: Any) -> None:
    """Render a template of `cloudrt/reports/templates` to `path` atomically.

    Besides `values`, the template gets the classes with their colours, and the grid.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("cloudrt.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "count": "{:,}".format}
    height, width = labels.submit_grid
    chunks = environment.get_template(template).stream(
        classes=labels.classes,
        colours=class_colours(len(labels.classes)),
        dashes=DASHES,
        width=width,
        height=height,
        unit=max(width, height) / 525,
        version=VERSION,
        **values,
    )
    # File names may contain bytes that are not UTF-8; they are lone surrogates, which cannot be encoded.
    with replacing(path) as partial, partial.open("w", encoding="utf-8", errors="replace") as file:
        file.writelines(chunks)


def make_card(
    labels: Labels,
    key: str,
    path: Path | None,
    rle: Mapping[str, str],
    max_pixels: int = MAX_PIXELS,
    side: int = _SIDES[0][1],
    wide: bool = False,
) -> Card:
    """Read an image and trace the outlines of its masks.

    Parameters
    ----------
    labels
        Classes and grids.
    key
        Caption of the image.
    path
        The image; None if it is not a file.
    rle
        Class name -> RLE text on the submission grid.
    max_pixels
        Larger images are not decoded.
    side
        Pixels of the longer side of the picture.
    wide
        See `Card`. The longer side of the picture then has two to four times as many pixels, by its aspect ratio.
    """
    if wide:
        side = round(side * min(4.0, max(2.0, labels.submit_grid[1] / labels.submit_grid[0] / 1.5)))
    picture, note = None, "Not a file: only the outlines are shown."
    if path is not None:
        try:
            picture = embed(load_image(path, display_size(labels.submit_grid, side), max_pixels))
            note = ""
        except ImageError as error:
            note = f"No picture: the file {error}."
    outlines = [
        trace(index, rle_decode(rle[name], labels.submit_grid))
        for index, name in enumerate(labels.classes)
        if rle.get(name)
    ]
    return Card(key, picture, note, outlines, labels.submit_grid, wide)


def trace(index: int, mask: NDArray[np.uint8]) -> Outline:
    """Return the outline of a mask, in pixels of its grid.

    Parameters
    ----------
    index
        Index of the class.
    mask
        (H, W) uint8, 0 or 1; not empty.
    """
    contours, _ = cv2.findContours(np.ascontiguousarray(mask), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    tolerance = max(mask.shape) / 1000
    parts = []
    for contour in contours:
        corners = cv2.approxPolyDP(contour, tolerance, True).reshape(-1, 2)
        parts.append("M" + "L".join(f"{x} {y}" for x, y in corners.tolist()) + "Z")
    # The class name is placed at the point of the largest part that is farthest from its edge.
    largest = max(contours, key=cv2.contourArea)
    left, top, width, height = cv2.boundingRect(largest)
    inside = np.zeros((height + 2, width + 2), np.uint8)
    cv2.drawContours(inside, [largest], -1, 1, cv2.FILLED, offset=(1 - left, 1 - top))
    _, _, _, (x, y) = cv2.minMaxLoc(cv2.distanceTransform(inside, cv2.DIST_L2, 3))
    return Outline(index, float(mask.mean()), "".join(parts), (x + left - 1, y + top - 1))


def picture_side(count: int) -> int:
    """Return the number of pixels of the longer side of each picture on a page of `count` images."""
    return next((side for most, side in _SIDES if count <= most), _SMALLEST_SIDE)


def percent(share: float) -> str:
    """Return a fraction as a percentage, never rounding to zero: "12.3%", "<0.1%", "0%"."""
    if 0 < share < 0.001:
        return "<0.1%"
    return f"{100 * share:.1f}%" if share else "0%"


def embed(image: NDArray[np.uint8]) -> str:
    """Return an (H, W, 3) uint8 RGB image as the data URI of a JPEG."""
    _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return data_uri(data.tobytes(), "jpeg")


def data_uri(content: bytes, kind: str) -> str:
    """Return the bytes of an image file of a kind, such as "png", as a data URI."""
    return f"data:image/{kind};base64,{b64encode(content).decode('ascii')}"
