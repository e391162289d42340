"""Reading CSV tables of RLE rows: train.csv, submissions and sample_submission.csv."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cloudrt.errors import DataError
from cloudrt.labels import CLOUDS, Labels
from cloudrt.system.files import is_special

MAX_COMMAS = 100
"""Largest number of commas in a line. Names may contain some, but pandas needs much more memory for a column than the
comma takes in the file."""

Table = dict[tuple[str, str], str]
"""(image name, class) -> RLE text, in the order of the file."""


def read_table(path: str | Path, labels: Labels = CLOUDS) -> Table:
    """Read a table of RLE rows; the RLE texts are not checked, see `rle_decode`.

    Raises
    ------
    DataError
        A missing file, a file that is not CSV, a wrong header, a row whose key has no known class, or a repeated row;
        the message names the row.
    """
    table: Table = {}
    for line, key, text in read_rows(path, labels):
        name, _, label = key.rpartition("_")
        if not name or label not in labels.classes:
            raise DataError(
                f"{path}, line {line}: {key!r} does not end in _CLASS with a class of {', '.join(labels.classes)}"
            )
        if (name, label) in table:
            raise DataError(f"{path}, line {line}: {key!r} occurs twice")
        table[name, label] = text
    return table


def read_rows(path: str | Path, labels: Labels) -> Iterator[tuple[int, str, str]]:
    """Yield the line number, key and RLE text of each row that is not blank.

    A row counts as one line; the header is line 1.

    Raises
    ------
    DataError
        A missing file, a file that is not CSV, a wrong header, or a line of more than `MAX_COMMAS` commas.
    """
    import pandas as pd

    header = list(labels.header)
    if Path(path).exists() and is_special(path):
        raise DataError(f"{path} is not a regular file")
    try:
        with Path(path).open("rb") as file:  # given a path, pandas would download a URL
            _refuse_wide(file, path)
            file.seek(0)
            frame = pd.read_csv(file, dtype=str, keep_default_na=False, skip_blank_lines=False, encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not a CSV table of {','.join(header)} in UTF-8: {reason}") from error
    if list(frame.columns) != header:
        found = ",".join(map(str, frame.columns))[:200]
        raise DataError(f"{path}: the header is {found!r}, expected {','.join(header)!r}")
    if not isinstance(frame.index, pd.RangeIndex):
        raise DataError(f"{path}: the rows have more than two fields, expected {','.join(header)}")
    for line, (key, text) in enumerate(zip(frame[header[0]], frame["EncodedPixels"], strict=True), start=2):
        if key or text:
            yield line, key, text


def _refuse_wide(file: BinaryIO, path: str | Path) -> None:
    """Raise DataError for a line of too many columns, before pandas allocates them."""
    for number, line in enumerate(file, start=1):
        if max(part.count(b",") for part in line.splitlines()) > MAX_COMMAS:
            raise DataError(f"{path}, line {number}: more than {MAX_COMMAS} commas, expected two fields")
