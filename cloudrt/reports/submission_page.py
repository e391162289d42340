"""The HTML page about a submission: totals, a sample of images with outlined masks, and failures.

`Report.add` is called for each image and keeps sums, a random sample of keys and RLE texts, and the first failures:
memory does not grow with the number of images. `Report.write` decodes the images of the sample again, traces the
outlines of their masks, and renders `templates/report.html`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cloudrt.images.headers import MAX_PIXELS
from cloudrt.labels import Labels
from cloudrt.masks.rle import rle_area
from cloudrt.reports.page import Card, data_uri, make_card, picture_side, write_page

LISTED_FAILURES = 10_000
BINS = 10
_SEED = 0
_PANORAMA = 1.5
"""An image is a panorama if the longer side of its grid is at least this many times that of the submission grid."""


@dataclass(frozen=True)
class FrequencyPictures:
    """Maps of the frequencies of several days.

    Parameters
    ----------
    pictures
        Class name -> PNG.
    days
        Number of days.
    wide
        Whether they are shown as wide as the page.
    """

    pictures: Mapping[str, bytes]
    days: int
    wide: bool = False


@dataclass
class ClassTotals:
    """Totals of a class.

    Parameters
    ----------
    images
        Number of images with the class.
    area
        Pixels of the masks.
    share
        Sum over the images of the fraction of the grid that is covered.
    histogram
        Number of images by the fraction of the grid that is covered.
    """

    images: int = 0
    area: int = 0
    share: float = 0.0
    histogram: list[int] = field(default_factory=lambda: [0] * BINS)


@dataclass(frozen=True)
class _Sampled:
    number: int
    key: str
    path: Path | None
    rle: dict[str, str]
    labels: Labels


class Report:
    """Collects the content of a page.

    Parameters
    ----------
    labels
        Classes and grids.
    shown
        Number of images in the sample.
    max_pixels
        Limit of the prediction; larger images are not decoded again.
    """

    def __init__(self, labels: Labels, shown: int = 24, max_pixels: int = MAX_PIXELS) -> None:
        self.labels = labels
        self.shown = shown
        self.max_pixels = max_pixels
        self.images = 0
        self.failed = 0
        self.pixels = 0
        self.one_grid = True
        self.totals = {name: ClassTotals() for name in labels.classes}
        self.together = np.zeros((len(labels.classes), len(labels.classes)), np.int64)
        self.failures: list[tuple[str, str]] = []
        self._sample: list[_Sampled] = []
        self._random = random.Random(_SEED)

    def add(
        self,
        key: str,
        path: Path | None,
        rle: dict[str, str] | None,
        error: str | None,
        labels: Labels | None = None,
    ) -> None:
        """Count one image; images are added in order.

        Parameters
        ----------
        key
            Key of its rows.
        path
            Where `write` reads the image again; None if it is not a file.
        rle
            Class name -> RLE text on the submission grid; a missing class is empty.
        error
            Reason of the failure, or None.
        labels
            Classes and grids of this image, if they are not those of the report.
        """
        self.images += 1
        if error is not None:
            self.failed += 1
            if len(self.failures) < LISTED_FAILURES:
                self.failures.append((key, error))
            return
        texts = {name: (rle or {}).get(name, "") for name in self.labels.classes}
        labels = labels or self.labels
        self.one_grid = self.one_grid and labels.submit_grid == self.labels.submit_grid
        self._count(texts, math.prod(labels.submit_grid))
        # Reservoir sampling, algorithm R (Vitter, 1985, ACM TOMS 11, page 37): all valid images are equally likely.
        sound = self.images - self.failed
        place = len(self._sample) if sound <= self.shown else self._random.randrange(sound)
        if place < self.shown:
            self._sample[place : place + 1] = [_Sampled(sound, key, path, texts, labels)]

    def write(self, path: Path, facts: dict[str, str], maps: FrequencyPictures | None = None) -> None:
        """Write the page atomically.

        Parameters
        ----------
        path
            The HTML file.
        facts
            Names and values for the top of the page, such as the model and the provider.
        maps
            Maps of the frequencies of several days, if there are any.
        """
        sample = sorted(self._sample, key=lambda sampled: sampled.number)
        side = picture_side(len(sample))
        write_page(
            path,
            "report.html",
            self.labels,
            report=self,
            facts=facts,
            sound=self.images - self.failed,
            maps={name: data_uri(picture, "png") for name, picture in maps.pictures.items()} if maps else {},
            days=maps.days if maps else 0,
            wide_maps=maps.wide if maps else False,
            cards=(self._card(one, side) for one in sample),
            sampled=len(sample),
            failures_file=f"{path.stem}.failures.csv",
        )

    @property
    def rows_with_mask(self) -> int:
        """Number of rows of the submission that are not empty."""
        return sum(totals.images for totals in self.totals.values())

    def _card(self, one: _Sampled, side: int) -> Card:
        wide = max(one.labels.submit_grid) >= _PANORAMA * max(self.labels.submit_grid)
        return make_card(one.labels, one.key, one.path, one.rle, self.max_pixels, side, wide)

    def _count(self, texts: dict[str, str], pixels: int) -> None:
        self.pixels += pixels
        present = []
        for index, (name, text) in enumerate(texts.items()):
            if not text:
                continue
            area = rle_area(text)
            totals = self.totals[name]
            totals.images += 1
            totals.area += area
            totals.share += area / pixels
            totals.histogram[min(area * BINS // pixels, BINS - 1)] += 1
            present.append(index)
        self.together[np.ix_(present, present)] += 1
