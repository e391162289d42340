"""Atomic writes, locks and checksums of files.

A file is first written under a hidden name in the same folder, and renamed at the end. The hidden name contains the
machine, process id and start time of the writer, ".NAME.MACHINE-PID-START.part", so that a later run can remove the
files of killed processes only.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import IO

from cloudrt.errors import DataError

logger = logging.getLogger(__name__)


def is_special(path: str | Path) -> bool:
    """Return whether a path is a pipe, a socket or a device: reading it may never end.

    Raises
    ------
    OSError
        The path does not exist, or its folder cannot be read.
    """
    mode = Path(path).stat().st_mode
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


@contextmanager
def replacing(path: str | Path, *, sync: bool = True) -> Iterator[Path]:
    """Replace a file atomically: yield a temporary path beside `path`, renamed to `path` at the end.

    On any error the temporary file is removed and `path` stays as it was. Where `path` is a symbolic link, its target
    is replaced. Files that killed processes left in the folder are removed.

    Parameters
    ----------
    path
        The file to write; missing folders are created.
    sync
        Flush the file and its folder to disk: a power cut leaves the old file or the new one. False is faster.

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
    path, given = Path(path), str(path)
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is not a regular file: give the name of a file to write")
    if path.parent.exists() and not path.parent.is_dir():
        raise DataError(f"{path.parent} is not a folder: {path.name} cannot be written there")
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    partial = partial_path(path)
    try:
        yield partial
        if sync:
            with partial.open("r+b") as file:
                os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.filename in (None, str(partial)):  # a failed write names no file; the user knows only the final name
            error.filename = given
        raise
    finally:
        partial.unlink(missing_ok=True)
    if sync:
        sync_folder(path.parent)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Replace a folder: yield a temporary path beside `path`, renamed to `path` at the end.

    If the block creates no folder, `path` is only removed. On any error the temporary folder is removed, and `path` is
    as before. Where `path` is a symbolic link, its target is replaced. See also `remove_leftovers`.

    Yields
    ------
    pathlib.Path
        Where to create the folder.

    Raises
    ------
    OSError
        The disk is full or not writable; `filename` is `path`.
    """
    path, given = Path(os.path.realpath(path)), str(path)
    remove_leftovers(path.parent)
    partial, before = partial_path(path), partial_path(path).with_suffix(".replaced")
    try:
        yield partial
        if path.exists():
            path.rename(before)
        if partial.exists():
            partial.rename(path)
        remove_tree(before)
    except BaseException as error:
        if before.exists() and not path.exists():
            before.rename(path)
        if isinstance(error, OSError) and error.filename in (None, str(partial)):
            error.filename = given
        raise
    finally:
        remove_tree(partial)


def partial_path(path: Path) -> Path:
    """Return the hidden path beside `path` that this process writes to before it renames it."""
    return path.with_name(f".{_short(path.name)}.{_machine()}-{os.getpid()}-{_started(os.getpid()) or 0}.part")


def _short(name: str) -> str:
    raw = os.fsencode(name)  # file systems allow 255 bytes
    return name if len(raw) <= 120 else f"{raw[:100].decode(errors='ignore')}~{hashlib.sha256(raw).hexdigest()[:16]}"


def remove_leftovers(folder: Path) -> None:
    """Remove the partial files and folders of processes that have ended; each process checks a folder once.

    A folder that such a process was replacing gets its name back (shortened if it has more than 120 bytes), unless the
    new folder is in its place. Files of running processes, of other machines or containers, and from before a restart
    of the machine are kept; without /proc, all.
    """
    _remove_leftovers(str(folder.absolute()), os.getpid())


_PARTIAL = re.compile(r"\.(.+)\.([0-9a-f]{16})-([1-9]\d{0,8})-([1-9]\d*)\.(part|replaced)", re.DOTALL)


@lru_cache(maxsize=4096)
def _remove_leftovers(folder: str, _process: int) -> None:
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = _PARTIAL.fullmatch(entry.name)
            if not found or found[2] != _machine() or not _ended(int(found[3]), int(found[4])):
                continue
            if found[5] == "replaced" and found[1] not in (_short(one.name) for one in Path(folder).iterdir()):
                with suppress(OSError):
                    Path(entry.path).rename(Path(folder, found[1]))
            else:
                remove_tree(Path(entry.path))


def remove_tree(path: Path) -> None:
    """Remove a file, a link, or a folder with its content; errors are ignored."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


@cache
def _machine() -> str:
    """Return 16 hexadecimal digits that identify machine, boot and container, in which process ids are unique."""
    parts = [platform.node()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return hashlib.sha256("\n".join(parts).encode(errors="replace")).hexdigest()[:16]


def _started(process: int) -> int | None:
    """Return the start time of a process in clock ticks since boot; None if there is no such process, or no /proc."""
    try:
        status = Path(f"/proc/{process}/stat").read_bytes()
        return int(status.rpartition(b")")[2].split()[19])  # proc(5): field 22; the name, field 2, may hold spaces
    except (OSError, ValueError, IndexError):
        return None


def _ended(process: int, started: int) -> bool:
    """Return whether the process with this id and start time has certainly ended."""
    now = _started(process)
    if now is not None:
        return now != started
    if _started(os.getpid()) is None:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # a process of another user, hidden in /proc
        return False
    return False


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to an OSError without a file name, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def reserve(file: int) -> None:
    """Allocate disk space for an open file before it is memory-mapped.

    Otherwise, writing to the map on a full disk raises SIGBUS, which ends the process.

    Raises
    ------
    OSError
        The disk is full.
    """
    size = os.fstat(file).st_size
    if size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that files created or renamed in it survive a power cut."""
    if hasattr(os, "O_DIRECTORY"):  # Windows cannot open folders
        opened = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def try_lock(file: IO[bytes]) -> bool:
    """Lock an open file until it is closed; return False if another process holds the lock.

    On Windows, and on file systems without locks such as some mounts of Lustre, nothing is locked.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("%s: no locks on this file system (%s); run one command at a time on it", file.name, error)
    return True


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Return whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def locked(path: Path, advice: str) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, created if it is missing, for the duration of the block.

    If the block fails and the folder contains nothing else, the file and the folders that were missing are removed.

    Raises
    ------
    DataError
        Another process holds the lock; the message ends with `advice`. See `try_lock` for where nothing is locked.
    """
    missing = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        # A failed run may have removed the file between opening and locking it.
        if not try_lock(file) or not _is_at(file, path):
            raise DataError(f"{path.parent} is being written by another run: {advice}")
        try:
            yield
        except BaseException:
            with suppress(OSError):
                if [entry.name for entry in path.parent.iterdir()] == [path.name]:
                    path.unlink()
                    for folder in missing:
                        folder.rmdir()
            raise


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
