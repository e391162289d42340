"""Files and folders: their content, the listed failures, and writes that fail as on a full disk."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cloudrt.inference.submission import RunPaths


def contents(path: Path) -> dict[str, bytes]:
    """Return relative path -> content of every file below a folder, or of one file."""
    files = [one for one in sorted(path.rglob("*")) if one.is_file()] if path.is_dir() else [path]
    return {one.relative_to(path).as_posix(): one.read_bytes() for one in files}


def read_pairs(table: Path) -> dict[str, str]:
    """Return first column -> second column of a CSV file without its header: RLE rows, or the list of failures."""
    with table.open(newline="", encoding="utf-8") as file:
        return dict(list(csv.reader(file))[1:])


def failures(output: Path) -> dict[str, str]:
    """Return the failed images of a run and their reasons."""
    return read_pairs(RunPaths(output).failures)


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Make writes beyond `limit` bytes of a file fail with EFBIG, as on a full disk (setrlimit(2))."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
