"""Whether two ways give the same answers: asked before any of their times counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import CloudrtError
from cloudrt.images.image import ImageFile
from cloudrt.inference.pipeline import Segmenter
from cloudrt.labels import Labels
from cloudrt.masks.metric import dice
from cloudrt.masks.postprocess import apply_rules
from cloudrt.masks.rle import rle_decode
from cloudrt.masks.table import Table, read_table

from . import notebook

Maps = list[tuple[NDArray[np.uint8], NDArray[np.uint8] | None]]
"""Of each image, the artifact's probability (C, W, H) and its presence (C,) or None."""


class AgreementError(CloudrtError):
    """A peer that gives other answers than cloudrt: its time would mean nothing."""


@dataclass(frozen=True)
class Agreement:
    """How the two ways' answers compare.

    Parameters
    ----------
    rows_identical
        Rows of (image, class) for which both post-processings gave the same text on the same maps: all of them.
    masks
        How many of those rows are not empty.
    dice
        Mean Dice between the two submissions, end to end, over every (image, class).
    empty_mismatch
        Share of rows empty in one submission and not in the other.
    """

    rows_identical: int
    masks: int
    dice: float = 0.0
    empty_mismatch: float = 0.0


def compare_rows(segmenter: Segmenter, files: Sequence[ImageFile], maps: Maps) -> Agreement:
    """Require the notebook's post-processing to give our texts on our maps, in both forms that it is timed on.

    Raises
    ------
    AgreementError
        Names the first image and class that differ.
    """
    rules = segmenter.artifact.rules
    identical = masks = 0
    for file, (levels, presence) in zip(files, maps, strict=True):
        ours = apply_rules(levels, rules, presence)
        view = levels.transpose(0, 2, 1)
        for form in (view, np.ascontiguousarray(view, np.float32) / np.float32(255)):
            theirs = notebook.rle_rows(form, rules, presence)
            for label, our_text, their_text in zip(segmenter.labels.classes, ours, theirs, strict=True):
                if our_text != their_text:
                    raise AgreementError(
                        f"{file.key}, {label}: the notebook's post-processing of a {form.dtype} map gives another "
                        "RLE than ours, so that no time would count"
                    )
        identical += len(ours)
        masks += sum(map(bool, ours))
    return Agreement(identical, masks)


def compare_submissions(agreement: Agreement, labels: Labels, folder: Path) -> Agreement:
    """Add how far the two submissions, which the last stage left in `folder`, are apart.

    Raises
    ------
    AgreementError
        They do not have the same rows in the same order.
    """
    ours, theirs = (read_table(folder / name, labels) for name in ("ours.csv", "notebook.csv"))
    if list(ours) != list(theirs):
        raise AgreementError("the two submissions do not have the same rows in the same order")
    values = list(_dices(ours, theirs, labels))
    mismatched = sum(bool(ours[key]) != bool(theirs[key]) for key in ours)
    return replace(agreement, dice=float(np.mean(values)), empty_mismatch=mismatched / len(ours))


def _dices(ours: Table, theirs: Table, labels: Labels) -> Iterator[float]:
    for key, text in ours.items():
        yield dice(rle_decode(text, labels.submit_grid), rle_decode(theirs[key], labels.submit_grid))
