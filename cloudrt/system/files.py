"""Files that are written whole or not at all, and what they are known by."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cloudrt.errors import DataError


@contextmanager
def replacing(path: str | Path, *, sync: bool = True) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; rename it onto `path` at the end, drop it on any error.

    The file and the folder's entry are flushed to disk, so that after a power cut there is the old file or the new one.
    Without `sync` that waits for the system's own time: for many small files. A symbolic link stays: the file that it
    names is replaced.

    Raises
    ------
    DataError
        `path` exists and is no regular file: a device, a pipe or a folder is never replaced by a file. Or what
        should be its folder is a file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is not a regular file: give the name of a file to write")
    if path.parent.exists() and not path.parent.is_dir():
        raise DataError(f"{path.parent} is not a folder: {path.name} cannot be written there")
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        if sync:
            with partial.open("r+b") as file:
                os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.filename == str(partial):  # the user knows the file by its own name
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)
    if sync:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a file that was made or renamed in it is there after a power cut."""
    if hasattr(os, "O_DIRECTORY"):  # not on Windows, where folders cannot be opened
        opened = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@contextmanager
def locked(path: Path, advice: str) -> Iterator[None]:
    """Hold a lock on the file `path`, which is made where it is missing, as long as the block runs.

    Raises
    ------
    DataError
        Another process holds it; ends in `advice`.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"{path.parent} is being written by another run: {advice}") from error
        yield


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
