"""Checks that a peer gives the same results as cloudrt; otherwise its times are not reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cloudrt.errors import CloudrtError
from cloudrt.labels import Labels
from cloudrt.masks.metric import dice
from cloudrt.masks.postprocess import apply_rules
from cloudrt.masks.rle import rle_decode
from cloudrt.masks.table import read_table

from . import notebook
from .workload import Workload

LEAST_DICE = 0.97
"""Minimum Dice between a peer's masks and ours from the same images; below it, the peer is skipped."""


class AgreementError(CloudrtError):
    """A peer gives other results than cloudrt, so the times cannot be compared."""


@dataclass(frozen=True)
class Agreement:
    """Agreement between the results of cloudrt and of the notebook.

    Parameters
    ----------
    rows_identical
        Number of rows (image, class) for which both post-processings gave the same text on the same maps. These are all
        rows, because `compare_rows` raises an error for a difference.
    masks
        Number of those rows that are not empty.
    dice
        Mean Dice between the two submissions, over every (image, class); None if none were written.
    empty_mismatch
        Share of rows empty in one submission only; None if none were written.
    """

    rows_identical: int
    masks: int
    dice: float | None = None
    empty_mismatch: float | None = None


def compare_rows(work: Workload) -> Agreement:
    """Check that the notebook's post-processing gives our texts on our maps, as uint8 and as float32.

    Raises
    ------
    AgreementError
        Names the first image and class that differ.
    """
    identical = masks = 0
    for file, (levels, presence) in zip(work.files, work.maps, strict=True):
        ours = apply_rules(levels, work.rules, presence)
        view = levels.transpose(0, 2, 1)
        for form in (view, np.ascontiguousarray(view, np.float32) / np.float32(255)):
            theirs = notebook.rle_rows(form, work.rules, presence)
            for label, our_text, their_text in zip(work.labels.classes, ours, theirs, strict=True):
                if our_text != their_text:
                    raise AgreementError(
                        f"{file.key}, {label}: the notebook's post-processing of a {form.dtype} map gives another RLE "
                        "than cloudrt: the times cannot be compared"
                    )
        identical += len(ours)
        masks += sum(map(bool, ours))
    return Agreement(identical, masks)


def compare_submissions(agreement: Agreement, labels: Labels, folder: Path) -> Agreement:
    """Add the differences between ours.csv and notebook.csv in `folder`, as written by the last timed pass.

    Raises
    ------
    AgreementError
        They do not have the same rows in the same order.
    """
    ours, theirs = (read_table(folder / name, labels) for name in ("ours.csv", "notebook.csv"))
    if list(ours) != list(theirs):
        raise AgreementError("the two submissions do not have the same rows in the same order")
    grid = labels.submit_grid
    scores = [dice(rle_decode(text, grid), rle_decode(theirs[key], grid)) for key, text in ours.items()]
    mismatched = sum(bool(ours[key]) != bool(theirs[key]) for key in ours)
    return replace(agreement, dice=float(np.mean(scores)), empty_mismatch=mismatched / len(ours))


def open_networks(
    openers: Mapping[str, Callable[[], notebook.Network]], work: Workload
) -> tuple[dict[str, notebook.Network], dict[str, str]]:
    """Open each network and compare its masks with ours.

    Parameters
    ----------
    openers
        Title -> function that opens the network.
    work
        Images, and the outputs of cloudrt.

    Returns
    -------
    The networks that agree, by their names, and title -> reason for those that are skipped.
    """
    opened, skipped = {}, {}
    for title, opener in openers.items():
        try:
            network = opener()
            found = mean_dice(network, work)
        except ModuleNotFoundError as error:
            skipped[title] = f"{error.name} is not installed"
            continue
        except (CloudrtError, RuntimeError, OSError) as error:
            skipped[title] = (str(error).splitlines() or [type(error).__name__])[0]
            continue
        if found < LEAST_DICE:
            skipped[title] = f"its masks differ from ours: Dice {found:.3f} on the same images, less than {LEAST_DICE}"
        else:
            opened[network.name] = network
    return opened, skipped


def mean_dice(network: notebook.Network, work: Workload) -> float:
    """Return the mean Dice between the masks of a network and ours, over every (image, class)."""
    scores = []
    for image, (levels, presence) in zip(work.loaded, work.maps, strict=True):
        probability, their_presence = network(image)
        grid = probability.shape[1:]
        ours = apply_rules(levels, work.rules, presence)
        theirs = notebook.rle_rows(probability, work.rules, their_presence)
        scores += [dice(rle_decode(a, grid), rle_decode(b, grid)) for a, b in zip(ours, theirs, strict=True)]
    return float(np.mean(scores))
