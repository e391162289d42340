"""The CSV of a submission: rows that are journalled as they come, and written whole or not at all."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloudrt.data import HEADER
from cloudrt.errors import DataError
from cloudrt.files import replacing
from cloudrt.journal import Identity, Journal, Record
from cloudrt.labels import Labels


@dataclass
class Submission:
    """A submission being written; counts what it has.

    Parameters
    ----------
    journal
        Takes every image as it is finished.
    labels
        The classes of its rows.
    resumed
        How many images an earlier run had finished: the first to come is the one at this position.
    """

    journal: Journal
    labels: Labels
    resumed: int = 0
    images: int = 0
    failed: int = 0
    rows_with_mask: int = 0

    def add(self, key: str, rle: dict[str, str], error: str | None, batch: int = 0) -> None:
        """Take the rows of one image, and its failure if it has one; `batch` as `Result` has it."""
        texts = tuple(rle[label] for label in self.labels.classes)
        self.journal.add(Record(key, texts, error, self.resumed + batch))
        self.count(texts, error)

    def count(self, texts: Sequence[str], error: str | None) -> None:
        """Count one image."""
        self.images += 1
        self.failed += error is not None
        self.rows_with_mask += sum(bool(text) for text in texts)

    def write(self, path: Path) -> None:
        """Write the rows to `path`, and the failures beside it if there are any; each whole or not at all."""
        failures = failures_path(path)
        with ExitStack() as stack:
            rows = _writer(stack, path)
            rows.writerow(HEADER)
            failed = _writer(stack, failures) if self.failed else None
            if failed:
                failed.writerow(("image", "reason"))
            for record in self.journal.records():
                rows.writerows(
                    (f"{record.key}_{label}", text)
                    for label, text in zip(self.labels.classes, record.texts, strict=True)
                )
                if failed and record.error is not None:
                    failed.writerow((record.key, record.error))
        if not self.failed:
            failures.unlink(missing_ok=True)


@contextmanager
def open_submission(
    path: Path, labels: Labels, identity: Identity | None = None, *, resume: bool = False
) -> Iterator[Submission]:
    """Write a submission to `path`, and its failures to failures.csv beside it; both appear at the end, or neither.

    Images go to a journal beside `path` first. With an `identity`, one that is cut short leaves it there, and a later
    one of the same identity that is to `resume` goes on from it: `Submission.resumed` says from which image. Where
    nothing failed there is no failures.csv: one from an earlier run is removed.

    Raises
    ------
    DataError
        `path` is a folder, or failures.csv itself; a journal of another identity, or one that another run writes.
    """
    failures = failures_path(path)
    if path == failures or (path.exists() and not path.is_file()):
        what = "the list of failures" if path == failures else "no regular file"
        raise DataError(f"{path} cannot be the submission, because it is {what}")
    path.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(journal_path(path), identity or {}, resume=resume)
    try:
        submission = Submission(journal, labels, journal.done)
        for record in journal.records():
            submission.count(record.texts, record.error)
        yield submission
        journal.sync()
        submission.write(path)
    except BaseException:
        if identity is None:
            journal.remove()
        journal.close()
        raise
    journal.remove()


def failures_path(submission: Path) -> Path:
    """Return where the failures of a submission are listed."""
    return submission.with_name("failures.csv")


def journal_path(submission: Path) -> Path:
    """Return where the journal of a submission lies while it is not finished."""
    return submission.with_name(f"{submission.name}.journal")


def _writer(stack: ExitStack, path: Path) -> Any:
    """Return a CSV writer to a file that replaces `path` when the stack closes without an error."""
    partial = stack.enter_context(replacing(path))
    return csv.writer(stack.enter_context(partial.open("w", newline="", encoding="utf-8")), lineterminator="\n")
