"""The HTML page about a submission: totals, a sample of images with outlined masks, and failures.

`Report.add` is called for each image and keeps sums, a random sample of keys and RLE texts, and the first failures:
memory does not grow with the number of images. `Report.write` decodes the images of the sample again, traces the
outlines of their masks, and renders `templates/report.html`.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cloudrt.images.headers import MAX_PIXELS
from cloudrt.labels import Labels
from cloudrt.reports.page import make_card, picture_side, write_page

LISTED_FAILURES = 10_000
BINS = 10
_SEED = 0


@dataclass
class ClassTotals:
    """Totals of a class.

    Parameters
    ----------
    images
        Number of images with the class.
    area
        Pixels of the submission grid.
    histogram
        Number of images by the fraction of the grid that is covered.
    """

    images: int = 0
    area: int = 0
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
        Larger images are not decoded again; the limit of the prediction.
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
        self._count(texts, math.prod(labels.submit_grid))
        # Reservoir sampling, algorithm R (Vitter, 1985, ACM TOMS 11, page 37): all valid images are equally likely.
        sound = self.images - self.failed
        place = len(self._sample) if sound <= self.shown else self._random.randrange(sound)
        if place < self.shown:
            self._sample[place : place + 1] = [_Sampled(sound, key, path, texts, labels)]

    def write(self, path: Path, facts: dict[str, str]) -> None:
        """Write the page atomically.

        Parameters
        ----------
        path
            The HTML file.
        facts
            Names and values for the top of the page, such as the model and the provider.
        """
        height, width = self.labels.submit_grid
        sample = sorted(self._sample, key=lambda sampled: sampled.number)
        side = picture_side(len(sample))
        write_page(
            path,
            "report.html",
            self.labels,
            report=self,
            facts=facts,
            sound=self.images - self.failed,
            pixels=height * width,
            cards=(make_card(one.labels, one.key, one.path, one.rle, self.max_pixels, side) for one in sample),
            sampled=len(sample),
            failures_file=f"{path.stem}.failures.csv",
        )

    @property
    def rows_with_mask(self) -> int:
        """Number of rows of the submission that are not empty."""
        return sum(totals.images for totals in self.totals.values())

    def _count(self, texts: dict[str, str], pixels: int) -> None:
        present = []
        for index, (name, text) in enumerate(texts.items()):
            if not text:
                continue
            area = sum(map(int, text.split()[1::2]))
            totals = self.totals[name]
            totals.images += 1
            totals.area += area
            totals.histogram[min(area * BINS // pixels, BINS - 1)] += 1
            present.append(index)
        self.together[np.ix_(present, present)] += 1
