"""Partitions: a fixed number of images each, in the order of the submission, and their files of rows.

    images --cut--> partitions --workers--> part-00000.parquet, part-00001.parquet ... --merge--> submission.csv

run.json beside them holds the identity of the run and the paths of its outputs. Files are written atomically, so a
file that exists is finished.
Parquet files have the columns of `cloudrt.inference.outputs.write_parquet`. part-00000.csv is a piece of the
submission, and part-00000.failures.csv, written before it, lists its failed images. For panoramas,
part-00000.places.json, written before the rows, has the grid and position of each image, or null if it failed.
part-00000.sums.json, written before the rows too, has the digest of the run's identity and the SHA-256 of the
partition's other files.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cloudrt.cluster.listing import ListedImage
from cloudrt.cluster.storage import Place
from cloudrt.cluster.storage_errors import StorageError
from cloudrt.errors import DataError
from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.inference.identity import Identity
from cloudrt.inference.journal_records import Record
from cloudrt.inference.outputs import FORMATS, write_failures
from cloudrt.labels import Labels
from cloudrt.system.overlap import overlap

FORMS = ("parquet", "csv")
MANIFEST = "run.json"
FORMAT = 4
READERS = 8
"""Number of partitions read concurrently while merging."""

_OURS = re.compile(r"part-\d{5,}(\.failures)?\.(parquet|csv)|part-\d{5,}\.(places|sums)\.json|run\.json")


class Partitions:
    """The folder of a run's files of rows.

    Parameters
    ----------
    place
        The folder.
    form
        One of `FORMS`.
    labels
        The classes of the rows.
    placed
        Whether the images are panoramas, whose masks have grids of their own.
    run
        Digest of the run's identity, which is written and compared with each partition; `begin` sets it.
    """

    def __init__(self, place: Place, form: str, labels: Labels, *, placed: bool = False, run: str = "") -> None:
        if form not in FORMS:
            raise DataError(f"the format of partitions must be {' or '.join(FORMS)}, found {form!r}")
        self.place, self.form, self.labels, self.placed, self.run = place, form, labels, placed, run

    def name(self, number: int) -> str:
        """Return the file name of a partition."""
        return f"part-{number:05}.{self.form}"

    def check(self, *, resume: bool, overwrite: bool) -> set[str]:
        """Return the names of the files of an earlier run.

        Raises
        ------
        DataError
            There are some, and neither `resume` nor `overwrite` is set.
        """
        there = {name for name in self.place.names() if _OURS.fullmatch(name)}
        if there and not (resume or overwrite):
            raise DataError(
                f"{self.place.uri} holds partitions already: --resume continues them, --overwrite replaces them"
            )
        return there

    def begin(
        self, identity: Identity, *, resume: bool, overwrite: bool, output: Path = Path("submission.csv")
    ) -> set[str]:
        """Record the run, and return the names of the files that an earlier run of the same identity finished.

        Raises
        ------
        DataError
            The folder has files and neither `resume` nor `overwrite` is set, or they belong to another run; names the
            differences.
        """
        there = self.check(resume=resume, overwrite=overwrite)
        if overwrite:
            for name in sorted(there, reverse=True):  # run.json first: files left by an interruption belong to no run
                self.place.remove(name)
            there = set()
        outputs = {str(output.resolve())}
        if MANIFEST in there:
            self._identity().require_same(identity, f"{self.place.uri}/{MANIFEST}")
            recorded = self._outputs()
            outputs |= recorded
        elif there:
            raise DataError(
                f"{self.place.uri} holds partitions without {MANIFEST}: use --overwrite, or other --partitions"
            )
        else:
            recorded = set()
        if outputs != recorded:
            record = {"format": FORMAT, "identity": identity.to_dict(), "outputs": sorted(outputs)}
            self.place.write(MANIFEST, json.dumps(record, indent=1).encode())
        self.run = hashlib.sha256(json.dumps(identity.to_dict(), sort_keys=True).encode()).hexdigest()
        return there - {MANIFEST}

    def recorded(self) -> Identity | None:
        """Return the identity of the run in the folder, if any."""
        return self._identity() if MANIFEST in self.place.names() else None

    def writes(self, output: Path) -> bool:
        """Return whether the run in the folder has this output, which it may have written before an interruption."""
        return str(output.resolve()) in self._outputs()

    def write(self, number: int, records: Sequence[Record]) -> None:
        """Write the rows of one partition atomically."""
        with TemporaryDirectory() as folder:
            path, failures = Path(folder, self.name(number)), Path(folder, "failures.csv")
            FORMATS[self.form](path, lambda: records, self.labels)
            files: dict[str, bytes] = {}
            if self.form == "csv":
                write_failures(failures, lambda: records)
                files[f"part-{number:05}.failures.csv"] = failures.read_bytes() if failures.exists() else b""
            if self.placed:
                places = [record.place.to_dict() if record.place else None for record in records]
                files[f"part-{number:05}.places.json"] = json.dumps(places).encode()
            files[self.name(number)] = path.read_bytes()  # last: it says that the partition is finished
            sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
            self.place.write(f"part-{number:05}.sums.json", json.dumps({"run": self.run} | sums).encode())
            for name, data in files.items():
                self.place.write(name, data)

    def read(self, number: int) -> list[Record]:
        """Return the rows of one partition.

        Raises
        ------
        DataError
            A file is damaged, missing or of another run.
        StorageError
            The store does not answer or denies access.
        """
        try:
            sums = json.loads(self.place.read(f"part-{number:05}.sums.json"))
            if sums["run"] != self.run:
                raise ValueError("the rows are those of another run")
            data = self._read(self.name(number), sums)
            rows = list(self._from_csv(number, data, sums) if self.form == "csv" else self._from_parquet(data))
            return self._with_places(number, rows, sums) if self.placed else rows
        except (ValueError, LookupError, TypeError, RecursionError, OSError) as error:
            if isinstance(error, StorageError):
                raise
            raise DataError(
                f"{self.place.uri}/{self.name(number)} is damaged, incomplete or of another run: remove it, and run "
                "again with --resume"
            ) from error

    def records(
        self, parts: Sequence[Sequence[ListedImage]], identity: Identity | None = None
    ) -> Callable[[], Iterator[Record]]:
        """Return a function that yields the rows of all partitions in order.

        Parameters
        ----------
        parts
            Images of each partition.
        identity
            Identity of the run, which is checked again after the last row; None checks nothing.

        Raises
        ------
        DataError
            During iteration: a partition holds other images than expected, or another run has begun in the folder.
        """

        def read(number: int) -> list[Record]:
            rows = self.read(number)
            if [row.key for row in rows] != [image.key for image in parts[number]]:
                raise DataError(
                    f"{self.place.uri}/{self.name(number)} holds other images than this run: use --overwrite"
                )
            return rows

        def records() -> Iterator[Record]:
            with ThreadPoolExecutor(READERS) as readers:
                for rows in overlap(readers, read, range(len(parts)), 2 * READERS):
                    yield from rows
            if identity is not None and self.recorded() != identity:  # a bucket cannot be locked
                raise DataError(
                    f"another run has begun in {self.place.uri} and may have replaced rows: run again with other "
                    "--partitions"
                )

        return records

    def _identity(self) -> Identity:
        where = f"{self.place.uri}/{MANIFEST}"
        try:
            values = json.loads(self.place.read(MANIFEST))
            version, identity = values["format"], values["identity"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{where} is damaged: use --overwrite, or other --partitions") from error
        if version != FORMAT:
            raise DataError(
                f"{where} has format {version}, written by another version of cloudrt (this one writes {FORMAT}): "
                "finish with that version, or use --overwrite"
            )
        try:
            found = Identity.from_dict(identity)
        except DataError as error:
            raise DataError(f"{where} is damaged ({error}): use --overwrite, or other --partitions") from error
        if found.partition_size < 1:
            raise DataError(f"{where} is damaged (partitions of no images): use --overwrite, or other --partitions")
        return found

    def _outputs(self) -> set[str]:
        outputs = json.loads(self.place.read(MANIFEST)).get("outputs")
        if not isinstance(outputs, list) or not all(isinstance(one, str) for one in outputs):
            raise DataError(f"{self.place.uri}/{MANIFEST} is damaged: use --overwrite, or other --partitions")
        return set(outputs)

    def _read(self, name: str, sums: Mapping[str, str]) -> bytes:
        data = self.place.read(name)
        if hashlib.sha256(data).hexdigest() != sums[name]:
            raise ValueError(f"the checksum of {name} is wrong")
        return data

    def _with_places(self, number: int, rows: Sequence[Record], sums: Mapping[str, str]) -> list[Record]:
        places = json.loads(self._read(f"part-{number:05}.places.json", sums))
        try:
            found = [None if place is None else MaskGrid.from_dict(place) for place in places]
        except (DataError, TypeError) as error:
            raise ValueError(str(error)) from error
        return [replace(row, place=place) for row, place in zip(rows, found, strict=True)]

    def _from_parquet(self, data: bytes) -> Iterator[Record]:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(io.BytesIO(data))
        images, texts, errors = (table[name].to_pylist() for name in ("image", "rle", "error"))
        yield from self._grouped(images, texts, dict(zip(images, errors, strict=True)))

    def _from_csv(self, number: int, data: bytes, sums: Mapping[str, str]) -> Iterator[Record]:
        import pandas

        failures = self._read(f"part-{number:05}.failures.csv", sums).decode()
        errors = {row["image"]: row["reason"] for row in csv.DictReader(io.StringIO(failures, newline=""))}
        # Not csv.reader, which refuses fields of more than 128 KiB.
        table = pandas.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False)
        keys, texts = (table[column].tolist() for column in self.labels.header)
        yield from self._grouped([key.rpartition("_")[0] for key in keys], texts, errors)

    def _grouped(self, images: Sequence[str], texts: Sequence[str], errors: Mapping[str, Any]) -> Iterator[Record]:
        classes = len(self.labels.classes)
        if len(images) % classes:
            raise ValueError("rows are missing")
        for begin in range(0, len(images), classes):
            key = images[begin]
            yield Record(key, tuple(texts[begin : begin + classes]), errors.get(key), 0)


class Counted:
    """Yields the rows of a run; the first time, counts masks and collects failures."""

    def __init__(self, records: Callable[[], Iterator[Record]], advance: Callable[[], object]) -> None:
        self._records, self._advance = records, advance
        self.rows_with_mask = 0
        self.failures: list[Record] = []
        self._counted = False

    def records(self) -> Iterator[Record]:
        """Yield all rows."""
        first, self._counted = not self._counted, True
        for record in self._records():
            if first:
                self.rows_with_mask += sum(bool(text) for text in record.texts)
                if record.error is not None:
                    self.failures.append(record)
                self._advance()
            yield record
