"""A submission: images that are journalled as they come, and a file that is written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cloudrt.errors import DataError
from cloudrt.inference.journal import Identity, Journal, Record
from cloudrt.inference.outputs import FORMATS, write_failures
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

    def add(self, key: str, rle: dict[str, str], error: str | None, batch: int = 0, size: int = 0) -> None:
        """Take the rows of one image, and its failure if it has one; `batch` and its `size` as `Result` has them."""
        texts = tuple(rle[label] for label in self.labels.classes)
        self.journal.add(Record(key, texts, error, self.resumed + batch, size))
        self.count(texts, error)

    def count(self, texts: Sequence[str], error: str | None) -> None:
        """Count one image."""
        self.images += 1
        self.failed += error is not None
        self.rows_with_mask += sum(bool(text) for text in texts)

    def write(self, path: Path, form: str = "csv") -> None:
        """Write the rows to `path`, and the failures beside it if there are any; each whole or not at all."""
        FORMATS[form](path, self.journal.records, self.labels)
        write_failures(failures_path(path), self.journal.records)


@contextmanager
def open_submission(
    path: Path, labels: Labels, identity: Identity | None = None, *, resume: bool = False, form: str = "csv"
) -> Iterator[Submission]:
    """Write a submission to `path`, and its failures to failures.csv beside it; they appear at the end, or not at all.

    `form` is of `cloudrt.inference.outputs.FORMATS`.

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
        submission.write(path, form)
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
