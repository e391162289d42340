"""What runs leave on disk: the bytes of outputs, the listed failures, and writes that fail as on a full disk."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cloudrt.inference.submission import RunPaths


def content(output: Path) -> dict[str, bytes]:
    """Return the bytes of an output by relative path; the output is a file or a folder."""
    files = [path for path in sorted(output.rglob("*")) if path.is_file()] if output.is_dir() else [output]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def failures(output: Path) -> dict[str, str]:
    """Return the failed images of a run and their reasons."""
    with RunPaths(output).failures.open(newline="") as file:
        return {row["image"]: row["reason"] for row in csv.DictReader(file)}


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
