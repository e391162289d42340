"""The user's cache folder: location, size limits and integrity of cached entries.

    USER_CACHE/cloudrt/KIND/ENTRY

An entry is a file or a folder that can be created again. The cache is optional: if it cannot be written, `open_entry`
returns None and the caller works without it. Each kind keeps its most recently used entries, up to a number of bytes.
For files that a third-party runtime would execute without verification, a checksum is stored beside the file (`seal`).
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cloudrt.system.files import partial_path, remove_leftovers, remove_tree, replacing, sha256

logger = logging.getLogger(__name__)

LIMITS = {
    "kernels": 256 * 2**20,
    "openvino": 4 * 2**30,
    "tensorrt": 8 * 2**30,
    "tensorrt-rtx": 2 * 2**30,
    "plans": 4 * 2**20,
    "artifacts": 4 * 2**30,
    "datasets": 64 * 2**30,
}
"""Largest total size of the entries of each kind, in bytes."""

SEAL = ".sha256"
"""Suffix of the file that contains the checksum of another file."""


def cache_folder(kind: str) -> Path:
    """Return the folder of all entries of a kind, one of `LIMITS`; it may not exist yet."""
    from platformdirs import user_cache_path

    return Path(user_cache_path("cloudrt"), kind)


def open_entry(kind: str, name: str, folder: Path | None = None) -> Path | None:
    """Return the folder of one entry, created if it is missing and marked as the most recently used.

    Creating an entry removes the least recently used ones beyond the limit of the kind.

    Parameters
    ----------
    kind
        One of `LIMITS`.
    name
        Name of the entry: a digest of everything that it depends on.
    folder
        Folder of the entries; `cache_folder` by default.

    Returns
    -------
    pathlib.Path or None
        None if the folder cannot be written.
    """
    entry = (folder or cache_folder(kind)) / name
    try:
        if not entry.is_absolute():  # the user has no home folder
            raise OSError(f"{entry} is not an absolute path")
        new = not entry.exists()
        entry.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=entry).close()
    except OSError as error:
        logger.debug("cannot cache anything in %s: %s", entry, error)
        return None
    mark_used(entry)
    if new:
        prune(kind, folder, keep=entry)
    return entry


def mark_used(entry: Path) -> None:
    """Mark an entry as the most recently used; errors are ignored."""
    with suppress(OSError):
        os.utime(entry)


def prune(kind: str, folder: Path | None = None, reserve: int = 0, keep: Path | None = None) -> None:
    """Remove the least recently used entries of a kind beyond its limit.

    Parameters
    ----------
    kind
        One of `LIMITS`.
    folder
        Folder of the entries; `cache_folder` by default.
    reserve
        Size of an entry that is about to be written, in bytes.
    keep
        An entry that stays even if it is larger than the limit.
    """
    used: dict[Path, tuple[float, int]] = {}
    folder = folder or cache_folder(kind)
    remove_leftovers(folder)
    with suppress(OSError):
        for entry in folder.iterdir():
            if not entry.name.startswith("."):  # hidden: being written or removed
                with suppress(OSError):  # removed by another process meanwhile
                    used[entry] = entry.stat().st_mtime, _size(entry)
    free = LIMITS[kind] - reserve
    if keep in used:
        free -= used.pop(keep)[1]
    for entry, (_, size) in sorted(used.items(), key=lambda item: item[1][0], reverse=True):
        free -= size
        if free < 0:
            _remove(entry)


def _size(entry: Path) -> int:
    files = entry.rglob("*") if entry.is_dir() else [entry]
    return sum(file.lstat().st_size for file in files if not file.is_dir())


def _remove(entry: Path) -> None:
    """Remove an entry. It is renamed first, so that no other process reads an incomplete entry."""
    doomed = partial_path(entry)
    with suppress(OSError):
        entry.rename(doomed)
        remove_tree(doomed)


def seal(files: Iterable[Path]) -> None:
    """Write the SHA-256 of each file beside it, as NAME.sha256; errors are ignored."""
    for file in files:
        with suppress(OSError), replacing(file.with_name(file.name + SEAL), sync=False) as partial:
            partial.write_text(sha256(file), encoding="ascii")


def remove_damaged(files: Iterable[Path]) -> None:
    """Remove the files that have no stored checksum or do not match it; see `seal`.

    Raises
    ------
    OSError
        A file cannot be read or removed.
    """
    for file in files:
        checksum = file.with_name(file.name + SEAL)
        if not checksum.is_file() or checksum.read_bytes() != sha256(file).encode("ascii"):
            logger.debug("removing %s: it is damaged or incomplete", file)
            file.unlink(missing_ok=True)
            checksum.unlink(missing_ok=True)
