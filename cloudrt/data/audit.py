"""Checks of the rows and masks of a labelled data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.data.folder import writes_absences
from cloudrt.errors import RleError
from cloudrt.labels import Labels
from cloudrt.masks.rle import rle_to_submit_grid
from cloudrt.masks.table import read_rows

SMALL = 0.1
"""Masks with less than this fraction of the median area of their class are suspicious."""
LARGE = 0.9
"""Masks with a larger fraction of the grid are suspicious, unless the median mask of their class covers half of it."""
OUTSIDE = 0.5
"""Masks with a larger fraction of their area where the image has no data are suspicious."""
SAME = 0.9
"""Intersection over union at which two classes of one image count as the same mask."""


@dataclass(frozen=True)
class Finding:
    """A possible error in a data set.

    Parameters
    ----------
    kind
        Category, which is the heading in the report.
    key
        Name of the image, or key of the row.
    reason
        What was found, such as "is not in train.csv".
    line
        Line of train.csv if one row is at fault, else 0.
    """

    kind: str
    key: str
    reason: str
    line: int = 0


def audit_rows(path: Path, labels: Labels) -> tuple[dict[str, dict[str, str]], list[Finding]]:
    """Read train.csv and check its rows.

    Returns
    -------
    texts
        Image name -> class -> RLE text on the label grid, from the valid rows; the class of an invalid row is missing.
    findings
        The errors of the other rows, masks that vanish on the submission grid, and missing rows.

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
            findings.append(Finding("Invalid row", key, f"does not end in _CLASS with a class of {expected}", line))
            continue
        first = lines.setdefault((name, label), line)
        if first != line:
            findings.append(Finding("Invalid row", key, f"repeats line {first}", line))
            continue
        image = texts.setdefault(name, {})
        try:
            mask = rle_to_submit_grid(text, labels)
        except RleError as error:
            findings.append(Finding("Invalid row", key, str(error), line))
            continue
        image[label] = text
        if text and not mask.any():
            findings.append(
                Finding("Suspicious mask", key, "is so small that it vanishes on the submission grid", line)
            )
    for name in texts if writes_absences(texts) else ():
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
    """Yield findings about the masks of one image.

    Parameters
    ----------
    name
        Name of the image.
    labels
        Classes and grids.
    masks
        (C, H, W) uint8, 0 or 1, on the submission grid.
    shares
        Fraction of the grid that each mask covers.
    dark
        (h, w) uint8, 1 where the image has no data, of any size; None if the image cannot be read.
    """
    kind = "Suspicious mask"
    outside = None
    if dark is not None and dark.any():
        outside = cv2.resize(dark, labels.submit_grid[::-1], interpolation=cv2.INTER_NEAREST)
    for index, (label, share) in enumerate(zip(labels.classes, shares, strict=True)):
        key = f"{name}_{label}"
        if share and outside is not None:
            lost = float(outside[masks[index] > 0].mean())
            if lost > OUTSIDE:
                yield Finding(kind, key, f"has {100 * lost:.0f}% of its area where the image has no data")
        for other in range(index):
            union = np.count_nonzero(masks[index] | masks[other])
            both = np.count_nonzero(masks[index] & masks[other])
            if union and both / union >= SAME:
                yield Finding(
                    kind, key, f"is almost identical to the mask of {labels.classes[other]} (IoU {both / union:.2f})"
                )


def audit_shares(shares: Mapping[str, Sequence[float]], labels: Labels) -> Iterator[Finding]:
    """Yield the masks that are unusually small or large for their class.

    Parameters
    ----------
    shares
        Image name -> the fraction of the grid that each class covers, (C,).
    labels
        Classes and grids.
    """
    for index, label in enumerate(labels.classes):
        covered = {name: one[index] for name, one in shares.items() if one[index]}
        typical = float(np.median(list(covered.values()))) if covered else 0.0
        for name, share in covered.items():
            if share < SMALL * typical:
                reason = f"covers only {100 * share:.2g}% of the image; the median of {label} is {100 * typical:.2g}%"
                yield Finding("Suspicious mask", f"{name}_{label}", reason)
            if share > LARGE and typical < 0.5:
                yield Finding("Suspicious mask", f"{name}_{label}", f"covers {100 * share:.0f}% of the image")
