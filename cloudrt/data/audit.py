"""What is wrong or doubtful in the rows and masks of a labelled data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import DataError, RleError
from cloudrt.images.image import find_images
from cloudrt.labels import Labels
from cloudrt.masks.rle import rle_to_submit_grid
from cloudrt.masks.table import read_rows

SMALL, LARGE = 0.02, 0.9
"""Shares of the grid: masks below or above are rare among clouds, and often a slip of the mouse."""
OUTSIDE = 0.5
"""Share of a mask's pixels that may lie where the image has no data."""
ALIKE = 0.9
"""Intersection over union from which two classes of one image are the same mask."""


@dataclass(frozen=True)
class Finding:
    """Something doubtful: its kind, the row or image, and why; `line` is train.csv's, 0 where it is an image."""

    kind: str
    key: str
    reason: str
    line: int = 0


def audit_rows(path: Path, labels: Labels) -> tuple[dict[str, dict[str, str]], list[Finding]]:
    """Return image name -> class -> RLE text on the label grid, of the sound rows, and what is wrong with the others.

    A wrong row leaves its class empty.

    Raises
    ------
    DataError
        See `read_rows`.
    """
    texts: dict[str, dict[str, str]] = {}
    findings = []
    lines: dict[tuple[str, str], int] = {}
    for line, key, text in read_rows(path, labels):
        name, _, label = key.rpartition("_")
        if not name or label not in labels.classes:
            expected = ", ".join(labels.classes)
            findings.append(Finding("Wrong row", key, f"does not end in _CLASS with a class of {expected}", line))
            continue
        first = lines.setdefault((name, label), line)
        if first != line:
            findings.append(Finding("Wrong row", key, f"is there already in line {first}", line))
            continue
        image = texts.setdefault(name, {})
        try:
            mask = rle_to_submit_grid(text, labels)
        except RleError as error:
            findings.append(Finding("Wrong row", key, str(error), line))
            continue
        image[label] = text
        if text and not mask.any():
            findings.append(
                Finding("Doubtful mask", key, "is so small that nothing is left on the submission grid", line)
            )
    for name in texts:
        missing = [label for label in labels.classes if (name, label) not in lines]
        if missing:
            findings.append(Finding("Missing row", name, f"has no row for {', '.join(missing)}"))
    return texts, findings


def audit_masks(
    name: str,
    labels: Labels,
    masks: NDArray[np.uint8],
    shares: tuple[float, ...],
    dark: NDArray[np.uint8] | None,
) -> Iterator[Finding]:
    """Yield what is doubtful in the masks of one image.

    Parameters
    ----------
    name
        Of the image.
    labels
        Classes and grids.
    masks
        (C, H, W) uint8 of 0 and 1 on the submission grid.
    shares
        Of the grid that each covers.
    dark
        (h, w) uint8 of 0 and 1: where the image has no data, at any size; None where it cannot be read.
    """
    kind = "Doubtful mask"
    outside = None
    if dark is not None and dark.any():
        outside = cv2.resize(dark, labels.submit_grid[::-1], interpolation=cv2.INTER_NEAREST)
    for index, (label, share) in enumerate(zip(labels.classes, shares, strict=True)):
        key = f"{name}_{label}"
        if 0 < share < SMALL:
            yield Finding(kind, key, f"covers {100 * share:.1f}% of the image only")
        if share > LARGE:
            yield Finding(kind, key, f"covers {100 * share:.0f}% of the image")
        if share and outside is not None:
            lost = float(outside[masks[index] > 0].mean())
            if lost > OUTSIDE:
                yield Finding(kind, key, f"lies for {100 * lost:.0f}% where the image has no data")
        for other in range(index):
            union = np.count_nonzero(masks[index] | masks[other])
            both = np.count_nonzero(masks[index] & masks[other])
            if union and both / union >= ALIKE:
                yield Finding(kind, key, f"is nearly the mask of {labels.classes[other]} (IoU {both / union:.2f})")


def audit_files(folder: Path, texts: dict[str, dict[str, str]]) -> Iterator[Finding]:
    """Yield the images of a folder that no row names."""
    try:
        files = find_images(folder)
    except DataError:  # none at all: each is named as unreadable
        return
    for file in files:
        if file.key not in texts:
            yield Finding("Image without a row", file.key, "is not in train.csv")
