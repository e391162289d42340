"""The journal of finished images, from which an interrupted run continues, even after a kill or a power failure.

Each line is one record with its own checksum, so that an incomplete end is detected and dropped; see
`journal_records.py`. The first record is the run's identity. The others are images in order, each with its position,
its key, and the position of the first image of its batch. A resumed run starts at the beginning of the last recorded
batch, which may be incomplete, so that every batch contains the same images as in a run without interruption.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any, BinaryIO, cast

from cloudrt.errors import DataError
from cloudrt.inference.identity import Identity
from cloudrt.inference.journal_records import Record, compact, decode, encode, pack, unpack
from cloudrt.system.files import naming, sync_folder, try_lock

FORMAT = 3
SYNC_SECONDS = 2.0
"""Time after which the next complete batch is flushed to the disk; a power failure can lose about this much work,
besides the current batch."""
FLUSH_SECONDS = 0.05
"""Minimum time between two writes to the file. A batch that completes sooner is written with the next one, and is lost
if the process is killed before. A write releases the GIL; waiting to take it again takes longer than the rest of
`Journal.add`."""
BUFFER = 2**20
"""Size of the file's write buffer, in bytes; a full buffer is written immediately."""

_ADVICE = "the journal was edited; use `overwrite=True` to start again"
_TORN = re.compile(rb"[0-9a-f]{0,8}(\Z|\x00)|[0-9a-f]{8} ")
"""First line of a journal that a power failure may have left incomplete."""


class Journal:
    """The journal of one run. The file is kept until `remove` is called.

    Parameters
    ----------
    path
        The file.
    identity
        Identity of this run; None for a run that is never resumed.
    keys
        Keys of the images in order. The records of an earlier run must have the same keys; None does not check them.
    resume
        Whether to continue from the existing records; if False, they are discarded.
    check
        Function of one bool: whether the file existed. It is called after the file is locked and before it is changed,
        and may raise an exception to refuse the run.

    Attributes
    ----------
    done
        Number of images of an earlier run that are not run again.
    size
        Batch size of the last batch that the earlier run recorded; 0 if there is none.

    Raises
    ------
    DataError
        `path` is a link or not a regular file, or another run is writing it. With `resume`: the file is damaged, is not
        a journal, or has another format or identity.
    OSError
        The file cannot be created or written.
    """

    def __init__(
        self,
        path: Path,
        identity: Identity | None,
        *,
        keys: Sequence[str] | None = None,
        resume: bool = False,
        check: Callable[[bool], object] | None = None,
    ) -> None:
        # Writing to a link would change a file that is not named after the output.
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise DataError(f"{path} is not a regular file: give another `output`")
        if path.exists() and path.stat().st_nlink > 1:
            raise DataError(f"{path} is a file with another name too, a hard link: give another `output`")
        self.path = path
        self._keys = keys
        begun = self._open()
        try:
            if check is not None:
                check(begun)
            self.size = 0
            self.done, end = self._recover(identity) if resume and identity else (0, 0)
            if not end:
                self._file.truncate(0)
                end = self._write_header(identity)
            # Records after `end` belong to a batch that runs again. They are kept until a new record is added;
            # otherwise each run that is killed before then would lose one more batch.
            self._end: int | None = end
            self._position = self.done
            self._synced = self._flushed = 0.0
            self.sync()
            sync_folder(path.parent)
        except BaseException:
            if not begun:
                self.remove()
            self._file.close()
            raise

    def add(self, record: Record) -> None:
        """Append a finished image."""
        if self._end is not None:
            self._file.truncate(self._end)
            self._file.seek(self._end)
            self._end = None
        with naming(self.path):
            self._file.write(pack(encode(record, self._position)))
        self._position += 1
        if record.place is None and self._position < record.batch + record.size:
            return  # the batch is not complete; batches of panoramas consist of tiles, and are not counted here
        now = time.monotonic()
        if now - self._synced > SYNC_SECONDS:
            self.sync()
        elif now - self._flushed > FLUSH_SECONDS:
            with naming(self.path):
                self._file.flush()
            self._flushed = now

    def sync(self) -> None:
        """Flush everything to the disk."""
        with naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
        self._synced = self._flushed = time.monotonic()

    def records(self) -> Iterator[Record]:
        """Yield all records in order; no record may be added during the iteration."""
        self._file.flush()
        with self.path.open("rb") as file:
            file.seek(self._first_record)
            place = self._first_record
            for position, line in enumerate(file):
                if self._end is not None and place >= self._end:
                    return
                place += len(line)
                values = unpack(line)
                if values is None:
                    raise DataError(f"{self.path} is damaged: remove it, and run again")
                yield self._checked(values, position)

    def remove(self) -> None:
        """Delete the file, because the run is complete or was refused; it stays locked until then."""
        if os.name == "nt":  # an open file cannot be deleted
            self._file.close()
        self.path.unlink(missing_ok=True)
        self._file.close()

    def close(self) -> None:
        """Flush everything to the disk and close the file, which a later run can resume."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def _write_header(self, identity: Identity | None) -> int:
        line = pack(compact({"format": FORMAT, "identity": identity.to_dict() if identity else None}).encode())
        self._file.seek(0)
        self._file.write(line)
        self._first_record = len(line)
        return self._first_record

    def _recover(self, identity: Identity) -> tuple[int, int]:
        """Return the number of images not to run again, and the byte where their records end.

        0, 0 if the header is incomplete.
        """
        self._file.seek(0)
        first = self._file.readline()
        header = unpack(first)
        if header is None:
            if not _TORN.match(first):
                raise DataError(f"{self.path} is not a journal: give another `output`, or `overwrite=True`")
            return 0, 0
        _read_header(header, self.path).require_same(identity, str(self.path))
        self._first_record = ends = len(first)
        starts: list[tuple[int, int]] = []  # of each batch: position of its first image, byte of its first record
        for position, line in enumerate(self._file):
            values = unpack(line)
            if values is None:
                break
            record = self._checked(values, position)
            if not starts or starts[-1][0] != record.batch:
                if record.batch != position:
                    raise DataError(f"{self.path} record {position}: no batch begins at {record.batch}; {_ADVICE}")
                starts.append((record.batch, ends))
                self.size = record.size
            ends += len(line)
        # The last batch may be incomplete.
        return starts[-1] if starts else (0, ends)

    def _checked(self, values: dict[str, Any], position: int) -> Record:
        """Return the record of a line, after checking its values, its position and its key."""
        try:
            found, record = decode(values)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{self.path} record {position}: malformed; {_ADVICE}") from error
        expected = self._keys[position] if self._keys is not None and position < len(self._keys) else None
        if found != position or (self._keys is not None and record.key != expected):
            raise DataError(
                f"{self.path} record {position}: found image {found} ({record.key}), expected {position} ({expected}); "
                f"{_ADVICE}"
            )
        return record

    def _open(self) -> bool:
        """Open and lock the file, a new one or that of an earlier run, and return whether it existed."""
        for mode, error in cycle((("x+b", FileExistsError), ("r+b", FileNotFoundError))):
            try:
                self._file = cast(BinaryIO, self.path.open(mode, buffering=BUFFER))
            except error:  # created or deleted by another run
                continue
            if not try_lock(self._file):
                self._file.close()
                raise DataError(f"{self.path} is being written by another run: wait for it, or give another `output`")
            with suppress(FileNotFoundError):
                if os.path.samestat(self.path.stat(), os.fstat(self._file.fileno())):
                    return mode == "r+b"
            self._file.close()  # the run that wrote it has ended and deleted it
        raise AssertionError("cycle does not end")


def read_identity(path: Path) -> Identity | None:
    """Return the identity in a journal; None if there is no journal or its first record is incomplete.

    Raises
    ------
    DataError
        The journal has another format, or its identity is malformed.
    """
    try:
        with path.open("rb") as file:
            header = unpack(file.readline())
    except FileNotFoundError:
        return None
    return None if header is None else _read_header(header, path)


def _read_header(header: dict[str, Any], path: Path) -> Identity:
    if header.get("format") != FORMAT:
        raise DataError(
            f"{path} is a journal of format {header.get('format')}, written by another version of cloudrt (this one "
            f"writes format {FORMAT}): finish with that version, or use `overwrite=True`"
        )
    try:
        return Identity.from_dict(header.get("identity"))
    except DataError as error:
        raise DataError(f"{path}: {error}; use `overwrite=True`") from error
