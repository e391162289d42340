"""What the HTML pages of cloudrt share: one style, the classes' colours, images with their masks outlined.

Every page is one file that asks the network for nothing.
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
from cloudrt.images.image import MAX_PIXELS, load_image
from cloudrt.labels import Grid, Labels, class_colours
from cloudrt.masks.rle import rle_decode
from cloudrt.system.files import replacing
from cloudrt.system.versions import VERSION

# Pixels of the longer side of an image on the page, for so many images at most: all of them are in one file.
_SIDES = ((100, 700), (1_000, 400))
_SMALLEST_SIDE = 256
_JPEG_QUALITY = 82

# Outlines differ in more than colour.
DASHES = ("none", "9 4", "2.5 3.5", "10 3 2.5 3")


@dataclass(frozen=True)
class Outline:
    """A mask on an image: its class by number, its share of the grid, the SVG path around it, where its name goes."""

    index: int
    share: float
    path: str
    label: tuple[float, float]


@dataclass(frozen=True)
class Card:
    """An image of the sample, ready to be rendered; `picture` is a data URI, or None with a note that says why."""

    key: str
    picture: str | None
    note: str
    outlines: list[Outline]


def write_page(path: Path, template: str, labels: Labels, **values: Any) -> None:
    """Render a template of `cloudrt/templates` to `path`, whole or not at all.

    Besides `values` it gets what the gallery and the style need: the classes with their colours, and the grid.
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
    # File names may hold bytes that are no text; they arrive as lone surrogates, which UTF-8 cannot write.
    with replacing(path) as partial, partial.open("w", encoding="utf-8", errors="replace") as file:
        file.writelines(chunks)


def make_card(
    labels: Labels,
    key: str,
    path: Path | None,
    rle: Mapping[str, str],
    max_pixels: int = MAX_PIXELS,
    side: int = _SIDES[0][1],
) -> Card:
    """Read an image again and outline its masks.

    Parameters
    ----------
    labels
        Classes and grids.
    key
        Shown below the image.
    path
        None where the image is not a file.
    rle
        Class name -> RLE text on the submission grid; empty where there is none.
    max_pixels
        Larger images are not read.
    side
        Pixels of the picture's longer side.
    """
    picture, note = None, "Not a file: the outlines alone."
    if path is not None:
        try:
            picture = embed(load_image(path, display_size(labels.submit_grid, side), max_pixels))
            note = ""
        except ImageError as error:
            note = f"Missing: the file {error}."
    outlines = [
        trace(index, rle_decode(rle[name], labels.submit_grid))
        for index, name in enumerate(labels.classes)
        if rle.get(name)
    ]
    return Card(key, picture, note, outlines)


def trace(index: int, mask: NDArray[np.uint8]) -> Outline:
    """Return the outline of a mask that is not empty, in pixels of its grid.

    Parameters
    ----------
    index
        Of its class.
    mask
        (H, W) uint8, 0 or 1.
    """
    contours, _ = cv2.findContours(np.ascontiguousarray(mask), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    tolerance = max(mask.shape) / 1000
    parts = []
    for contour in contours:
        corners = cv2.approxPolyDP(contour, tolerance, True).reshape(-1, 2)
        parts.append("M" + "L".join(f"{x} {y}" for x, y in corners.tolist()) + "Z")
    # The name goes to the middle of the largest part, where there is the most room within it.
    largest = max(contours, key=cv2.contourArea)
    left, top, width, height = cv2.boundingRect(largest)
    inside = np.zeros((height + 2, width + 2), np.uint8)
    cv2.drawContours(inside, [largest], -1, 1, cv2.FILLED, offset=(1 - left, 1 - top))
    _, _, _, (x, y) = cv2.minMaxLoc(cv2.distanceTransform(inside, cv2.DIST_L2, 3))
    return Outline(index, float(mask.mean()), "".join(parts), (x + left - 1, y + top - 1))


def picture_side(count: int) -> int:
    """Return the pixels of an image's longer side on a page of `count` images: fewer where there are many."""
    return next((side for most, side in _SIDES if count <= most), _SMALLEST_SIDE)


def display_size(grid: Grid, side: int) -> Grid:
    """Return height and width at which an image is shown: the grid's shape, its longer side of `side` pixels."""
    scale = side / max(grid)
    return max(1, round(grid[0] * scale)), max(1, round(grid[1] * scale))


def percent(share: float) -> str:
    """Return a share of 1 as a percentage that never rounds something to nothing: "12.3%", "<0.1%", "0%"."""
    if 0 < share < 0.001:
        return "<0.1%"
    return f"{100 * share:.1f}%" if share else "0%"


def embed(image: NDArray[np.uint8]) -> str:
    """Return an RGB image as a data URI."""
    _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return "data:image/jpeg;base64," + b64encode(data.tobytes()).decode("ascii")
