"""The CSV of a submission: which images, in which order, and rows that are written whole or not at all."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloudrt.data import HEADER, read_table
from cloudrt.errors import DataError
from cloudrt.files import replacing
from cloudrt.images import ImageFile, find_images
from cloudrt.labels import Labels


def list_inputs(inputs: Sequence[Path], sample: Path | None, labels: Labels) -> list[ImageFile]:
    """Return the images to predict, in the order of their rows.

    Parameters
    ----------
    inputs
        Folders, read with their subfolders, or image files; rows are keyed by the path relative to the folder.
    sample
        A sample_submission.csv: its images alone, in its order. One that is not in the inputs is listed all the same,
        with the path where it should be, so that it fails by name.
    labels
        The classes that the sample's rows may name.

    Raises
    ------
    DataError
        No images; two inputs of one key; a sample that is malformed.
    """
    files: dict[str, ImageFile] = {}
    for folder in inputs:
        for file in find_images(folder):
            if file.key in files:
                raise DataError(
                    f"{files[file.key].path} and {file.path} would share the key {file.key!r}: "
                    "give one folder that holds both"
                )
            files[file.key] = file
    if sample is None:
        return list(files.values())
    wanted = dict.fromkeys(name for name, _ in read_table(sample, labels))
    if not wanted:
        raise DataError(f"{sample} has no rows")
    home = next((path for path in inputs if path.is_dir()), inputs[0].parent)
    return [files.get(name, ImageFile(name, home / name)) for name in wanted]


@dataclass
class Submission:
    """A submission being written; counts what it has."""

    images: int = 0
    failed: int = 0
    rows_with_mask: int = 0
    _rows: Any = field(default=None, repr=False)
    _failures: Any = field(default=None, repr=False)

    def add(self, key: str, rle: dict[str, str], error: str | None) -> None:
        """Write the rows of one image, and its failure if it has one."""
        for label, text in rle.items():
            self._rows.writerow((f"{key}_{label}", text))
            self.rows_with_mask += bool(text)
        self.images += 1
        if error is not None:
            self.failed += 1
            self._failures.writerow((key, error))


@contextmanager
def open_submission(path: Path) -> Iterator[Submission]:
    """Write a submission to `path`, and its failures to failures.csv beside it; both appear at the end, or neither.

    Where nothing failed there is no failures.csv: one from an earlier run is removed.

    Raises
    ------
    DataError
        `path` is a folder, or failures.csv itself.
    """
    failures = failures_path(path)
    if path == failures or path.is_dir():
        raise DataError(
            f"{path} cannot be the submission, because it is {'a folder' if path.is_dir() else 'the list of failures'}"
        )
    with ExitStack() as stack:
        partial_failures = stack.enter_context(replacing(failures))
        partial_rows = stack.enter_context(replacing(path))
        rows_file = stack.enter_context(partial_rows.open("w", newline="", encoding="utf-8"))
        failures_file = stack.enter_context(partial_failures.open("w", newline="", encoding="utf-8"))
        submission = Submission(
            _rows=csv.writer(rows_file, lineterminator="\n"), _failures=csv.writer(failures_file, lineterminator="\n")
        )
        submission._rows.writerow(HEADER)
        submission._failures.writerow(("image", "reason"))
        yield submission
    if not submission.failed:
        failures.unlink()


def failures_path(submission: Path) -> Path:
    """Return where the failures of a submission are listed."""
    return submission.with_name("failures.csv")
