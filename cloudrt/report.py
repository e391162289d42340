"""One HTML page about a submission: totals, a sample of images with their classes outlined, and what failed.

`Report.add` takes every image in turn and keeps sums, a random sample of the images' keys and RLE texts, and the first
failures, so that a million images need no more memory than a thousand. `Report.write` decodes the sample again, traces
the outlines of its masks, and renders `templates/report.html`. The page is one file: it asks the network for nothing.
"""

from __future__ import annotations

import colorsys
import random
from base64 import b64encode
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt import __version__
from cloudrt.errors import ImageError
from cloudrt.files import replacing
from cloudrt.images import MAX_PIXELS, load_image
from cloudrt.labels import Grid, Labels
from cloudrt.rle import rle_decode

LISTED_FAILURES = 200
BINS = 10
_LONGER_SIDE = 700  # pixels of an image on the page
_JPEG_QUALITY = 82
_SEED = 0

# Okabe and Ito's colours (2008), told apart by all forms of colour vision; green and vermilion a little lighter, since
# the ocean beneath is dark.
_COLOURS = ("#e69f00", "#56b4e9", "#ee7abf", "#2bd4a0", "#f0e442", "#ff7a45", "#a58bff", "#c9c9c9")
# Outlines differ in more than colour.
_DASHES = ("none", "9 4", "2.5 3.5", "10 3 2.5 3")


@dataclass
class ClassTotals:
    """Sums of one class over the images; areas in pixels of the submission grid."""

    images: int = 0
    area: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * BINS)


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


@dataclass(frozen=True)
class _Sampled:
    number: int
    key: str
    path: Path | None
    rle: dict[str, str]


class Report:
    """Collects what a page shows.

    Parameters
    ----------
    labels
        Classes and grids.
    shown
        Images in the sample.
    max_pixels
        Larger images are not read again; to be the limit that they were predicted under.
    """

    def __init__(self, labels: Labels, shown: int = 24, max_pixels: int = MAX_PIXELS) -> None:
        self.labels = labels
        self.shown = shown
        self.max_pixels = max_pixels
        self.images = 0
        self.failed = 0
        self.totals = {name: ClassTotals() for name in labels.classes}
        self.together = np.zeros((len(labels.classes), len(labels.classes)), np.int64)
        self.failures: list[tuple[str, str]] = []
        self._sample: list[_Sampled] = []
        self._random = random.Random(_SEED)

    def add(self, key: str, path: Path | None, rle: dict[str, str] | None, error: str | None) -> None:
        """Count one image; call it once for each, in order.

        Parameters
        ----------
        key
            Of the image's rows.
        path
            Where the image lies, to be read again by `write`; None where it is not a file.
        rle
            Class name -> RLE text on the submission grid; a class that is left out is empty.
        error
            Why the image failed, or None.
        """
        self.images += 1
        if error is not None:
            self.failed += 1
            if len(self.failures) < LISTED_FAILURES:
                self.failures.append((key, error))
            return
        texts = {name: (rle or {}).get(name, "") for name in self.labels.classes}
        self._count(texts)
        # Algorithm R (Vitter, 1985, ACM TOMS 11, page 37): each sound image ends up in the sample with equal chance.
        sound = self.images - self.failed
        place = len(self._sample) if sound <= self.shown else self._random.randrange(sound)
        if place < self.shown:
            self._sample[place : place + 1] = [_Sampled(sound, key, path, texts)]

    def write(self, path: Path, facts: dict[str, str]) -> None:
        """Render the page to `path`, whole or not at all.

        Parameters
        ----------
        path
            The HTML file.
        facts
            Names and values for the top of the page, such as the model and the provider.
        """
        from jinja2 import Environment, PackageLoader, StrictUndefined

        environment = Environment(
            loader=PackageLoader("cloudrt"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["percent"] = percent
        height, width = self.labels.submit_grid
        sample = sorted(self._sample, key=lambda sampled: sampled.number)
        chunks = environment.get_template("report.html").stream(
            report=self,
            facts=facts,
            sound=self.images - self.failed,
            pixels=height * width,
            width=width,
            height=height,
            colours=class_colours(len(self.labels.classes)),
            dashes=_DASHES,
            unit=max(width, height) / 525,
            cards=(self._card(sampled) for sampled in sample),
            sampled=len(sample),
            version=__version__,
        )
        # File names may hold bytes that are no text; they arrive as lone surrogates, which UTF-8 cannot write.
        with replacing(path) as partial, partial.open("w", encoding="utf-8", errors="replace") as file:
            file.writelines(chunks)

    @property
    def rows_with_mask(self) -> int:
        """Rows of the submission that are not empty."""
        return sum(totals.images for totals in self.totals.values())

    def _count(self, texts: dict[str, str]) -> None:
        height, width = self.labels.submit_grid
        present = []
        for index, (name, text) in enumerate(texts.items()):
            if not text:
                continue
            area = sum(map(int, text.split()[1::2]))
            totals = self.totals[name]
            totals.images += 1
            totals.area += area
            totals.histogram[min(area * BINS // (height * width), BINS - 1)] += 1
            present.append(index)
        self.together[np.ix_(present, present)] += 1

    def _card(self, sampled: _Sampled) -> Card:
        picture, note = None, "Not a file: the outlines alone."
        if sampled.path is not None:
            try:
                picture = _embed(load_image(sampled.path, display_size(self.labels.submit_grid), self.max_pixels))
                note = ""
            except ImageError as error:
                note = f"Missing: the file {error}."
        outlines = []
        for index, text in enumerate(sampled.rle.values()):
            if text:
                outlines.append(trace(index, rle_decode(text, self.labels.submit_grid)))
        return Card(sampled.key, picture, note, outlines)


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


def class_colours(count: int) -> list[str]:
    """Return a colour for each class, #rrggbb: those for all forms of colour vision first, then hues of the wheel."""
    wheel = (colorsys.hls_to_rgb(index * 0.618034 % 1, 0.66, 0.7) for index in range(count - len(_COLOURS)))
    more = ["#" + "".join(f"{round(255 * level):02x}" for level in rgb) for rgb in wheel]
    return [*_COLOURS[:count], *more]


def display_size(grid: Grid) -> Grid:
    """Return height and width at which an image is shown: the grid's shape, its longer side 700 pixels."""
    scale = _LONGER_SIDE / max(grid)
    return max(1, round(grid[0] * scale)), max(1, round(grid[1] * scale))


def percent(share: float) -> str:
    """Return a share of 1 as a percentage that never rounds something to nothing: "12.3%", "<0.1%", "0%"."""
    if 0 < share < 0.001:
        return "<0.1%"
    return f"{100 * share:.1f}%" if share else "0%"


def _embed(image: NDArray[np.uint8]) -> str:
    """Return an RGB image as a data URI."""
    _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return "data:image/jpeg;base64," + b64encode(data.tobytes()).decode("ascii")
