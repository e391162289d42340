"""A journal of finished images: what a run that was killed, or lost its power, goes on from.

One line a record, each with a checksum of its own, so that a torn tail is known and dropped:

    8 hexadecimal digits of CRC-32, a space, JSON

The first record is the run's identity: everything that the answers hang on. The others are images, in order, each with
the position where its batch began: a run goes on from the beginning of the batch that may have been under way, so that
every batch holds the same images as in a run that was never interrupted.
"""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cloudrt.errors import DataError
from cloudrt.system.files import sync_folder

FORMAT = 2
SYNC_SECONDS = 2.0
"""After a power cut, at most this much work is done again."""

_TORN = re.compile(rb"[0-9a-f]{0,8}(\Z|\x00)|[0-9a-f]{8} ")
"""How a journal begins that a power cut may have torn."""

Identity = Mapping[str, str | int]
"""What the answers hang on: name -> value."""


@dataclass(frozen=True)
class Record:
    """One finished image.

    Parameters
    ----------
    key
        Of its rows.
    texts
        RLE, one a class.
    error
        Why it failed, or None.
    batch
        The position of the first image of its batch.
    size
        The size of that batch: smaller than the identity's from where memory ran out.
    """

    key: str
    texts: tuple[str, ...]
    error: str | None
    batch: int
    size: int = 0


class Journal:
    """The journal of one run. A context manager; the file stays until `remove`.

    Parameters
    ----------
    path
        The file.
    identity
        Of this run.
    resume
        Go on from the records that are there, if any; otherwise begin afresh.

    Raises
    ------
    DataError
        Another run is writing it; or it is to be resumed, and is of a run with another identity.
    """

    def __init__(self, path: Path, identity: Identity, *, resume: bool) -> None:
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is no regular file: give another --output")
        self.path = path
        self._file: BinaryIO = path.open("r+b" if path.exists() else "x+b")
        try:
            self._lock()
            self.size = 0
            self.done, end = self._recover(identity) if resume else (0, 0)
            if not end:
                self._file.truncate(0)
                end = self._append({"format": FORMAT, "identity": dict(identity)}, 0)
            # What lies behind is of a batch that is done again: it stays until there is something new, for a run that
            # is killed before that would otherwise lose one batch more each time.
            self._end: int | None = end
            self._begin = self._first_record
            self.sync()
            sync_folder(path.parent)
        except BaseException:
            self._file.close()
            raise

    def add(self, record: Record) -> None:
        """Append a finished image."""
        if self._end is not None:
            self._file.truncate(self._end)
            self._file.seek(self._end)
            self._end = None
        values: dict[str, Any] = {"key": record.key, "texts": record.texts, "error": record.error}
        values |= {"batch": record.batch, "size": record.size}
        self._file.write(_line(values))
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Bring everything to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def records(self) -> Iterator[Record]:
        """Yield the records so far, in order; nothing may be added meanwhile."""
        self._file.flush()
        with self.path.open("rb") as file:
            file.seek(self._begin)
            place = self._begin
            for line in file:
                if self._end is not None and place >= self._end:
                    return
                place += len(line)
                values = _parse(line)
                if values is None:
                    raise DataError(f"{self.path} is damaged: remove it and run again")
                yield _record(values)

    def remove(self) -> None:
        """Drop the file: the run is complete."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Bring everything to the disk and leave the file for a later run."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def _append(self, values: dict[str, Any], position: int) -> int:
        line = _line(values)
        self._file.seek(position)
        self._file.write(line)
        self._first_record = position + len(line)
        return self._first_record

    def _recover(self, identity: Identity) -> tuple[int, int]:
        """Return how many images are done for good, and where their records end; 0, 0 where nothing can be used."""
        self._file.seek(0)
        first = self._file.readline()
        header = _parse(first)
        if header is None:
            if not _TORN.match(first):
                raise DataError(f"{self.path} is not a journal: give another --output, or --overwrite")
            return 0, 0
        if header.get("format") != FORMAT:
            raise DataError(f"{self.path} is of another version of cloudrt: finish with that one, or use --overwrite")
        refuse_differences(header["identity"], identity, self.path)
        self._first_record = ends = len(first)
        starts: list[tuple[int, int]] = []  # of each batch: the position of its first image, the byte of its record
        for line in self._file:
            values = _parse(line)
            if values is None:
                break
            if not starts or starts[-1][0] != values["batch"]:
                starts.append((values["batch"], ends))
                self.size = values["size"]
            ends += len(line)
        # The last batch may have been under way.
        return starts[-1] if starts else (0, ends)

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise DataError(
                f"{self.path} is being written by another run: wait for it, or give another --output"
            ) from error


def read_identity(path: Path) -> dict[str, Any] | None:
    """Return the identity that a journal was begun with; None where there is no journal, or none that can be used."""
    try:
        with path.open("rb") as file:
            header = _parse(file.readline())
    except FileNotFoundError:
        return None
    if header is None or header.get("format") != FORMAT:
        return None
    identity: dict[str, Any] = header["identity"]
    return identity


def _line(values: dict[str, Any]) -> bytes:
    text = json.dumps(values, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the values of a line, or None where it is torn or damaged."""
    if not line.endswith(b"\n") or line[8:9] != b" ":
        return None
    text = line[9:-1]
    if b"%08x" % zlib.crc32(text) != line[:8]:
        return None
    values: dict[str, Any] = json.loads(text)
    return values


def _record(values: dict[str, Any]) -> Record:
    return Record(values["key"], tuple(values["texts"]), values["error"], values["batch"], values["size"])


def refuse_differences(recorded: Mapping[str, Any], ours: Identity, path: Path | str) -> None:
    """Refuse to go on with a run of another identity.

    Raises
    ------
    DataError
        Names every value that differs.
    """
    differences = [
        f"{name} was {recorded.get(name, 'none')}, now {ours.get(name, 'none')}"
        for name in dict.fromkeys([*recorded, *ours])
        if recorded.get(name) != ours.get(name)
    ]
    if differences:
        raise DataError(
            f"{path} is of another run: {'; '.join(differences)}. Give the options of that run, or --overwrite"
        )
