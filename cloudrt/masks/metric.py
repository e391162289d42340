"""The competition's score: the mean over all (image, class) pairs of Dice, 2|A and B| / (|A| + |B|)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cloudrt.arguments import check_array, check_grid, check_path, check_type
from cloudrt.errors import DataError, RleError
from cloudrt.labels import CLOUDS, Grid, Labels
from cloudrt.masks.rle import rle_to_submit_grid


@dataclass(frozen=True)
class PresenceScore:
    """Scores of one class, separately for the images without and with it; a mean is None if there is no such image.

    Parameters
    ----------
    absent, present
        Number of images without and with the class.
    dice_absent
        Mean Dice where it is absent: the share of these images that have no predicted mask.
    dice_present
        Mean Dice where it is present; an image without a predicted mask counts 0.
    dice_found
        Mean Dice where it is both present and predicted.
    correct
        Share of the images, 0..1, in which it is predicted if and only if it is present.
    """

    absent: int
    present: int
    dice_absent: float | None
    dice_present: float | None
    dice_found: float | None
    correct: float


@dataclass(frozen=True)
class Score:
    """Score of a submission.

    Parameters
    ----------
    mean
        Mean Dice over all (image, class) pairs.
    per_class
        Class -> mean Dice.
    all_empty
        Mean Dice that a submission without any mask would have.
    images
        Number of images.
    ignored_rows, first_ignored
        Number of rows of the submission that the truth does not have, which are not scored, and the first of them.
    by_presence
        Class -> its `PresenceScore`.
    """

    mean: float
    per_class: dict[str, float]
    all_empty: float
    images: int
    ignored_rows: int = 0
    first_ignored: str = ""
    by_presence: dict[str, PresenceScore] = field(default_factory=dict)


def dice(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return the Dice coefficient of two (H, W) masks, 0..1; 1.0 if both are empty.

    Raises
    ------
    DataError
        Masks of different shapes, or not arrays.
    """
    for mask in (a, b):
        check_array("a mask", mask, "(H, W)")
    if a.shape != b.shape:
        raise DataError(f"the masks must have the same shape, found {a.shape} and {b.shape}")
    on_a, on_b = a != 0, b != 0
    total = int(on_a.sum()) + int(on_b.sum())
    return 1.0 if total == 0 else 2 * int((on_a & on_b).sum()) / total


def score(
    submission_csv: str | Path, truth_csv: str | Path, labels: Labels = CLOUDS, truth_grid: Grid | None = None
) -> Score:
    """Score a submission against the truth, as the competition does.

    Parameters
    ----------
    submission_csv
        Table of `Image_Label,EncodedPixels` with masks on the submission grid.
    truth_csv
        The same table with masks on `truth_grid`; every row of it is scored.
    labels
        Classes and grids.
    truth_grid
        The label grid (default) or the submission grid.

    Raises
    ------
    DataError
        A malformed table, a row of the truth that is missing in the submission, or a malformed RLE (the message names
        the row); a truth without rows, or on another grid.
    """
    from cloudrt.masks.table import read_table

    for name, path in (("submission_csv", submission_csv), ("truth_csv", truth_csv)):
        check_path(name, path)
    check_type("labels", labels, Labels, "a cloudrt.Labels")
    grid = labels.label_grid if truth_grid is None else check_grid("truth_grid", truth_grid, least=1)
    if grid not in (labels.label_grid, labels.submit_grid):
        known, other = (
            " or ".join(f"{width}x{height}" for height, width in grids)
            for grids in ((labels.label_grid, labels.submit_grid), (grid,))
        )
        raise DataError(f"the grid of the truth must be {known} (width x height), found {other}")
    truth = read_table(truth_csv, labels)
    predicted = read_table(submission_csv, labels)
    missing = [key for key in truth if key not in predicted]
    if missing:
        raise DataError(
            f"{submission_csv} lacks {len(missing)} of {len(truth)} rows of {truth_csv}, first {'_'.join(missing[0])}: "
            "predict every image of the truth"
        )
    if not truth:
        raise DataError(f"{truth_csv} has no rows")
    on_truth, on_submission = (replace(labels, label_grid=one) for one in (grid, labels.submit_grid))
    values: dict[str, list[_Scored]] = {label: [] for label in labels.classes}
    for (name, label), text in truth.items():
        wanted = _decode(text, on_truth, truth_csv, name, label)
        try:
            found = _decode(predicted[name, label], on_submission, submission_csv, name, label)
        except DataError as error:
            if not _fits(predicted[name, label], on_truth):
                raise
            raise DataError(f"{error}; it fits the grid of the truth: are the two tables swapped?") from error
        values[label].append(_Scored(dice(found, wanted), bool(wanted.any()), bool(found.any())))
    scored = {label: rows for label, rows in values.items() if rows}
    every = [row for rows in scored.values() for row in rows]
    ignored = ["_".join(key) for key in predicted if key not in truth]
    return Score(
        mean=fmean(row.dice for row in every),
        per_class={label: fmean(row.dice for row in rows) for label, rows in scored.items()},
        all_empty=fmean(not row.present for row in every),
        images=len({name for name, _ in truth}),
        ignored_rows=len(ignored),
        first_ignored=ignored[0] if ignored else "",
        by_presence={label: _divide(rows) for label, rows in scored.items()},
    )


class _Scored(NamedTuple):
    """The Dice of a row, and whether the truth and the submission have a mask."""

    dice: float
    present: bool
    predicted: bool


def _divide(rows: list[_Scored]) -> PresenceScore:
    present = [row for row in rows if row.present]
    return PresenceScore(
        absent=len(rows) - len(present),
        present=len(present),
        dice_absent=_mean(row.dice for row in rows if not row.present),
        dice_present=_mean(row.dice for row in present),
        dice_found=_mean(row.dice for row in present if row.predicted),
        correct=fmean(row.present == row.predicted for row in rows),
    )


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None


def _fits(text: str, labels: Labels) -> bool:
    try:
        rle_to_submit_grid(text, labels)
    except RleError:
        return False
    return True


def _decode(text: str, labels: Labels, table: str | Path, name: str, label: str) -> NDArray[np.uint8]:
    """Decode a text on the label grid to the submission grid."""
    try:
        return rle_to_submit_grid(text, labels)
    except RleError as error:
        height, width = labels.label_grid
        raise DataError(f"{table}, row {name}_{label}: {error} (grid {width}x{height})") from error
