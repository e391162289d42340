"""Writing a submission: each finished image is added to a journal, and the output is written atomically at the end.

Every file of a run is named after its output, so that several runs can share a folder. If the output is not CSV, the
names keep its suffix (submission.parquet.failures.csv):

    submission.csv            the rows
    submission.failures.csv   failed images and reasons; only if there are any
    submission.html           the report; only with --report
    submission.run.json       identity of the finished run, and SHA-256 of its output
    submission.csv.journal    until the run is finished
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cloudrt.errors import DataError
from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.images.image import ImageFile
from cloudrt.inference.identity import Identity
from cloudrt.inference.journal import Journal, read_identity
from cloudrt.inference.journal_records import Record
from cloudrt.inference.outputs import FormatOptions, output_digest, write_failures, write_rows
from cloudrt.inference.results import Result
from cloudrt.labels import Labels
from cloudrt.system.files import replacing

RUN_FORMAT = 1


@dataclass(frozen=True)
class RunPaths:
    """Paths of the files of a run.

    Parameters
    ----------
    output
        Path of the submission.
    """

    output: Path

    @property
    def _stem(self) -> str:
        """The output's name without .csv; other suffixes are kept, so that a.csv and a.parquet share no file."""
        return self.output.name.removesuffix(".csv") or self.output.name

    @property
    def failures(self) -> Path:
        """The list of failures."""
        return self.output.with_name(f"{self._stem}.failures.csv")

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.output.with_name(f"{self._stem}.html")

    @property
    def record(self) -> Path:
        """Identity of the finished run, and SHA-256 of its output."""
        return self.output.with_name(f"{self._stem}.run.json")

    @property
    def journal(self) -> Path:
        """The journal, which exists until the run is finished."""
        return self.output.with_name(f"{self.output.name}.journal")


@dataclass
class Submission:
    """A submission that is being written, with its counts.

    Parameters
    ----------
    journal
        Every finished image is added to it.
    labels
        The classes of the rows.
    resumed
        Number of images that the resumed run had finished, and so the position of the next one.
    images, failed, rows_with_mask
        Number of images, of failed images and of rows that are not empty, including those of the resumed run.
    first_error
        Why the first failed image failed; "" if none did.
    """

    journal: Journal
    labels: Labels
    resumed: int = 0
    images: int = 0
    failed: int = 0
    rows_with_mask: int = 0
    first_error: str = ""

    def add(
        self,
        key: str,
        rle: dict[str, str],
        error: str | None,
        batch: int = 0,
        size: int = 0,
        place: MaskGrid | None = None,
    ) -> None:
        """Add the rows of one image; `batch`, `size` and `place` are those of its `Result`."""
        texts = tuple(rle[label] for label in self.labels.classes)
        self.journal.add(Record(key, texts, error, self.resumed + batch, size, place))
        self.count(texts, error)

    def count(self, texts: Sequence[str], error: str | None) -> None:
        """Count one image."""
        self.images += 1
        self.failed += error is not None
        self.first_error = self.first_error or error or ""
        self.rows_with_mask += sum(bool(text) for text in texts)

    def finished(self, files: Iterable[ImageFile]) -> Iterator[tuple[ImageFile, Result]]:
        """Yield the images that the resumed run had finished, with their results; `files` are all images of the run."""
        for file, record in zip(files, self.journal.records(), strict=False):
            rle = dict(zip(self.labels.classes, record.texts, strict=True))
            grid = record.place.labels(self.labels) if record.place else self.labels
            yield file, Result(record.key, rle, record.error, grid, place=record.place)

    def write(self, paths: RunPaths, form: str = "csv", options: FormatOptions | None = None) -> None:
        """Write the rows, and the failures if there are any, each file atomically."""
        write_rows(paths.output, form, self.journal.records, self.labels, options)
        write_failures(paths.failures, self.journal.records if self.failed else lambda: ())


@contextmanager
def open_submission(
    path: Path,
    labels: Labels,
    identity: Identity | None = None,
    *,
    keys: Sequence[str] | None = None,
    resume: bool = False,
    form: str = "csv",
    options: FormatOptions | None = None,
    check: Callable[[bool], object] | None = None,
) -> Iterator[Submission]:
    """Open a submission; at the end of the block, write it to `path`, and the failures to a file named after it.

    The output is not written if the block raises an exception. Finished images are added to a journal. With an
    `identity`, an interrupted run keeps its journal, and a later run with the same identity and images continues from
    it with `resume`, at the image with position `Submission.resumed`.

    Parameters
    ----------
    path
        Path of the output; see `RunPaths` for the other files.
    labels
        The classes of the rows.
    identity
        Identity of the run; None for a run that is never resumed.
    keys
        Keys of the images in order; the records of the resumed run must have the same keys.
    resume
        Whether to continue from the journal, if there is one.
    form
        One of `cloudrt.inference.outputs.SUFFIXES`.
    options
        Options of that format.
    check
        See `Journal`.

    Raises
    ------
    DataError
        `path` is not a regular file, or the journal cannot be used; see `Journal`.
    OSError
        The journal or the output cannot be written.
    """
    paths = RunPaths(path)
    if path.exists() and not path.is_file() and form != "zarr":
        raise DataError(f"{path} is not a regular file: give the name of a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(paths.journal, identity, keys=keys, resume=resume, check=check)
    try:
        submission = Submission(journal, labels, journal.done)
        for record in journal.records():
            submission.count(record.texts, record.error)
        yield submission
        journal.sync()
        submission.write(paths, form, options)
        if identity is not None:
            write_run_record(paths, identity)
    except BaseException:
        if identity is None:
            journal.remove()
        journal.close()
        raise
    journal.remove()


def write_run_record(paths: RunPaths, identity: Identity) -> None:
    """Write the identity of a finished run and the SHA-256 of its output."""
    values = {"format": RUN_FORMAT, "identity": identity.to_dict(), "output_sha256": output_digest(paths.output)}
    with replacing(paths.record) as partial:
        partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read_run_record(paths: RunPaths) -> Identity:
    """Return the identity of the finished run that wrote the output.

    Raises
    ------
    DataError
        The record of the run is missing, damaged or of another version, or the output was changed since.
    """
    advice = "give another `output`, or `overwrite=True`"
    try:
        values = json.loads(paths.record.read_text(encoding="utf-8"))
        if values["format"] != RUN_FORMAT:
            raise DataError(f"{paths.record} was written by another version of cloudrt: {advice}")
        identity = Identity.from_dict(values["identity"])
        digest = values["output_sha256"]
    except FileNotFoundError:
        raise DataError(f"{paths.output} exists without {paths.record.name}, the record of its run: {advice}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise DataError(f"{paths.record}: {error}") from error
        raise DataError(f"{paths.record} is damaged: {advice}") from error
    if output_digest(paths.output) != digest:
        raise DataError(f"{paths.output} was changed after the run that wrote it: {advice}")
    return identity


def read_recorded(paths: RunPaths) -> Identity | None:
    """Return the identity of the interrupted or finished run to resume; None if there is nothing to resume.

    Raises
    ------
    DataError
        See `read_identity` and `read_run_record`.
    """
    if paths.journal.is_file():
        return read_identity(paths.journal)
    try:
        return read_run_record(paths)  # also without an output: a zarr run in which every image failed writes none
    except DataError:
        if paths.output.exists():
            raise
        return None
