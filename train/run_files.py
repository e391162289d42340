"""Names of the files in a run folder; without PyTorch, because `cloudrt-train` checks them before it loads PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cloudrt.errors import DataError

STATE = "state.pth"
"""The state of an interrupted run, which is in the folder until the run is finished."""
PROBABILITIES = "held_out.npz"
"""The held-out predictions of a fold, which the cross-validation merges."""
TENSORBOARD = "tensorboard"
"""Folder of the TensorBoard logs."""
RUN_STARTS = ("config.json", "held_out.txt")
"""Written when a run starts."""
RUN_RESULTS = ("best.pth", "last.pth", "history.csv", "curves.png", PROBABILITIES, STATE)
"""Results of a run. A later run in the same folder removes them."""
CROSS_RESULTS = ("folds.json", "oof.npz")
"""Results of a cross-validation, apart from the folders of its folds. A later run in the same folder removes them."""


def all_files(folder: Path, parts: Sequence[Path]) -> list[Path]:
    """Return the files that a run may write to `folder`, or that a cross-validation may write to it and its `parts`."""
    runs = [part / name for part in dict.fromkeys((*parts, folder)) for name in (*RUN_STARTS, *RUN_RESULTS)]
    return runs + [folder / name for name in CROSS_RESULTS]


def refuse_removed(reads: dict[str, Path | None], folder: Path | None) -> None:
    """Raise DataError if an input file is in a subfolder of `folder` of an earlier run, which will be removed.

    Without a `folder`, nothing is removed.
    """
    removed = [part.resolve() for part in (*folder.glob("fold-[0-9]*"), folder / TENSORBOARD)] if folder else []
    for option, path in reads.items():
        if path is not None and any(path.resolve().is_relative_to(part) for part in removed):
            raise DataError(f"{path} ({option}) would be removed with the earlier run: copy it to another folder first")
