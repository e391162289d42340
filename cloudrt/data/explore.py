"""Statistics and possible errors of a labelled data set: the library behind `cloudrt explore`.

    train.csv --audit_rows--> valid rows, findings
    each image --decoded once, reduced--> ImageSummary, position maps, findings    --> Exploration

A summary is a few numbers, so that the summaries of 100,000 images fit into memory.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.data.audit import Finding, audit_masks, audit_rows, audit_shares
from cloudrt.data.duplicates import difference_hash, similar_groups
from cloudrt.data.folder import DataFolder, writes_absences
from cloudrt.errors import DataError, ImageError
from cloudrt.images.image import NO_DATA_LEVEL, decode, read_file
from cloudrt.images.resize import display_size, resize
from cloudrt.labels import Grid, Labels
from cloudrt.masks.rle import rle_encode, rle_to_submit_grid
from cloudrt.system.overlap import overlap
from cloudrt.system.progress import ProgressBar, no_progress

BINS = 20
_THUMBNAIL = 280  # longer side, in pixels, of the thumbnail for the no-data fraction and the perceptual hash
_MAP = 105  # longer side of the position maps, in pixels


@dataclass(frozen=True)
class ImageSummary:
    """Statistics of one image. If the image cannot be decoded, `no_data` and `hash` are 0.

    Parameters
    ----------
    name
        Name in train.csv.
    size
        Height and width in pixels; None if the image cannot be decoded.
    no_data
        Fraction of pixels without data (black).
    shares
        Fraction of the submission grid that each class covers, (C,).
    digest
        SHA-256 of the file; "" if it cannot be read.
    hash
        See `difference_hash`.
    """

    name: str
    size: Grid | None
    no_data: float
    shares: tuple[float, ...]
    digest: str
    hash: int

    @property
    def present(self) -> tuple[bool, ...]:
        """Whether each class is present."""
        return tuple(share > 0 for share in self.shares)


@dataclass
class Exploration:
    """Statistics and findings of a data set.

    Parameters
    ----------
    data
        The data set.
    images
        Summaries of the images in train.csv, in its order.
    positions
        (C, h, w) float64: for each cell of a coarse grid, the fraction of it that the mask of a class covers, summed
        over the images.
    findings
        Possible errors.
    rle
        Image name -> class -> RLE on the submission grid, of the valid rows.
    """

    data: DataFolder
    images: list[ImageSummary]
    positions: NDArray[np.float64]
    findings: list[Finding] = field(default_factory=list)
    rle: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def labels(self) -> Labels:
        """Classes and grids."""
        return self.data.labels

    @property
    def present(self) -> NDArray[np.bool_]:
        """(N, C): whether each class is present in each image."""
        return np.array([image.present for image in self.images], bool).reshape(-1, len(self.labels.classes))

    @property
    def classes_per_image(self) -> list[int]:
        """Number of images with 0, 1, ... C classes."""
        counts = np.bincount(self.present.sum(axis=1), minlength=len(self.labels.classes) + 1)
        return [int(count) for count in counts]

    def correlation(self) -> NDArray[np.float64]:
        """Return the phi coefficient of each pair of classes, (C, C): Pearson's r of their presence over the images.

        NaN if a class is present in all images or in none.
        """
        present = self.present.astype(np.float64)
        centred = present - present.mean(axis=0) if len(present) else present
        spread = np.sqrt((centred**2).sum(axis=0))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(centred.T @ centred / np.outer(spread, spread))

    def area_histogram(self, index: int) -> list[int]:
        """Return the number of images with a class by the fraction of the grid that it covers, in `BINS` equal bins."""
        shares = [image.shares[index] for image in self.images if image.shares[index] > 0]
        return _histogram(shares)

    def no_data_histogram(self) -> list[int]:
        """Return the number of images by the fraction of pixels without data, in `BINS` equal bins."""
        return _histogram([image.no_data for image in self.images if image.size])

    def kinds(self) -> list[tuple[str, list[Finding]]]:
        """Return the findings by kind, in order of first occurrence."""
        kinds: dict[str, list[Finding]] = {}
        for finding in self.findings:
            kinds.setdefault(finding.kind, []).append(finding)
        return list(kinds.items())


def explore(data: DataFolder, threads: int = 1, bar: ProgressBar = no_progress) -> Exploration:
    """Read all rows and images of a data set, and check them.

    Parameters
    ----------
    data
        The data set.
    threads
        Number of threads that read images.
    bar
        Opens a progress bar.

    Raises
    ------
    DataError
        train.csv is not a table, or no row names an image.
    """
    labels = data.labels
    texts, findings = audit_rows(data.train_csv, labels)
    if not texts:
        raise DataError(f"{data.train_csv} names no image")
    unlisted = data.unlisted(texts)
    if not writes_absences(texts):  # images without any class
        texts |= {name: {} for name in unlisted}
        unlisted = []
    positions = np.zeros((len(labels.classes), *display_size(labels.submit_grid, _MAP)))
    exploration = Exploration(data, [], positions, findings)
    of_images: list[Finding] = []
    with bar("Reading images", len(texts)) as advance, ThreadPoolExecutor(threads) as pool:
        for summary, rle, maps, found in overlap(pool, lambda one: _read(data, *one), texts.items(), 4 * threads):
            exploration.images.append(summary)
            exploration.rle[summary.name] = rle
            exploration.positions += maps
            of_images += found
            advance(1)
    findings += of_images
    findings += audit_shares({image.name: image.shares for image in exploration.images}, labels)
    findings += [Finding("Image without a row", name, "is not in train.csv") for name in unlisted]
    findings += _other_sizes(exploration.images)
    findings += _duplicates(exploration.images, labels)
    return exploration


def _read(
    data: DataFolder, name: str, texts: dict[str, str]
) -> tuple[ImageSummary, dict[str, str], NDArray[np.float64], list[Finding]]:
    """Return the summary, the RLE texts, the position maps and the findings of one image."""
    labels = data.labels
    masks = np.stack([rle_to_submit_grid(texts.get(label, ""), labels) for label in labels.classes])
    height, width = display_size(labels.submit_grid, _MAP)
    maps = np.stack(
        [cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA) for mask in masks]
    )
    shares = tuple(float(mask.mean()) for mask in masks)
    size, no_data, digest, similarity = None, 0.0, "", 0
    findings: list[Finding] = []
    dark = None
    try:
        content = read_file(data.train_images / name)
        digest = hashlib.sha256(content).hexdigest()
        image = decode(content)
        size = (image.shape[0], image.shape[1])
        thumbnail = resize(image, display_size(size, _THUMBNAIL))
        dark = (thumbnail.max(axis=2) <= NO_DATA_LEVEL).astype(np.uint8)
        no_data, similarity = float(dark.mean()), difference_hash(thumbnail)
    except ImageError as error:
        findings.append(Finding("Unreadable image", name, str(error)))
    findings += audit_masks(name, labels, masks, shares, dark)
    rle = {label: rle_encode(mask) for label, mask in zip(labels.classes, masks, strict=True) if mask.any()}
    return ImageSummary(name, size, no_data, shares, digest, similarity), rle, maps, findings


def _other_sizes(images: list[ImageSummary]) -> Iterator[Finding]:
    """Yield the images whose size differs from the most common size."""
    sizes = Counter(image.size for image in images if image.size)
    if len(sizes) < 2:
        return
    (height, width), _ = sizes.most_common(1)[0]
    for image in images:
        if image.size and image.size != (height, width):
            reason = f"is {image.size[1]}x{image.size[0]}, most images are {width}x{height}"
            yield Finding("Different size", image.name, reason)


def _duplicates(images: list[ImageSummary], labels: Labels) -> Iterator[Finding]:
    """Yield identical and near-duplicate images, and the groups of them whose classes differ."""
    readable = [image for image in images if image.size and image.hash]  # the hash of a uniform image is 0
    groups: dict[int, list[ImageSummary]] = defaultdict(list)
    for image, group in zip(readable, similar_groups([image.hash for image in readable]).tolist(), strict=True):
        groups[group].append(image)
    for members in groups.values():
        for position, image in enumerate(members[1:], 1):
            same = next((other.name for other in members[:position] if other.digest == image.digest), None)
            reason = f"is the same file as {same}" if same else f"looks almost like {members[0].name}"
            yield Finding("Duplicate", image.name, reason)
    for members in groups.values():
        if len({image.present for image in members}) > 1:
            classes = "; ".join(f"{image.name}: {_classes(image, labels)}" for image in members[:6])
            more = "; ..." if len(members) > 6 else ""
            yield Finding("Duplicates with different classes", members[0].name, classes + more)


def _classes(image: ImageSummary, labels: Labels) -> str:
    return ", ".join(label for label, present in zip(labels.classes, image.present, strict=True) if present) or "none"


def _histogram(shares: list[float]) -> list[int]:
    return [int(count) for count in np.histogram(shares, BINS, (0, 1))[0]]
