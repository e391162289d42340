"""Atomic writes, locks and checksums of files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cloudrt.errors import DataError


@contextmanager
def replacing(path: str | Path, *, sync: bool = True) -> Iterator[Path]:
    """Replace a file atomically: yield a temporary path beside `path`, renamed to `path` at the end.

    On any error the temporary file is removed and `path` stays as it was. Where `path` is a symbolic link, its target
    is replaced.

    Parameters
    ----------
    path
        The file to write; missing folders are created.
    sync
        Flush the file and its folder to disk, so that a power cut leaves the old file or the new one. False leaves
        that to the operating system, for many small files.

    Yields
    ------
    pathlib.Path
        Where to write.

    Raises
    ------
    DataError
        `path` exists and is not a regular file, or its parent is not a folder.
    OSError
        The disk is full or not writable; `filename` is `path`.
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
        if error.filename == str(partial):  # the user knows only the final name
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)
    if sync:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that files created or renamed in it survive a power cut."""
    if hasattr(os, "O_DIRECTORY"):  # Windows cannot open folders
        opened = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@contextmanager
def locked(path: Path, advice: str) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, created where it is missing, for the duration of the block.

    Raises
    ------
    DataError
        Another process holds the lock; the message ends with `advice`.
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
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
