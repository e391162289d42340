"""The content of files and folders, for comparisons."""

from __future__ import annotations

import csv
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """Return relative path -> content of every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_pairs(table: Path) -> dict[str, str]:
    """Return first column -> second column of a CSV file without its header: RLE rows, or the list of failures."""
    with table.open(newline="", encoding="utf-8") as file:
        return dict(list(csv.reader(file))[1:])
