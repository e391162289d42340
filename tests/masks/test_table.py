"""Tables that would take much more memory than the size of their file."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest

from cloudrt.errors import DataError
from cloudrt.masks.table import MAX_COMMAS, read_table


@pytest.mark.parametrize("place", ["header", "row", "later", "one long line"])
def test_a_bomb_of_columns_is_refused_before_it_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    wide = "a," * 500_000
    head = "Image_Label,EncodedPixels\n"
    text = {"header": wide, "row": head + wide, "later": head + "a.jpg_Fish,\n" * 9 + wide + "\n"}
    (tmp_path / "t.csv").write_text(text.get(place, head.strip() + "\r" + wide))
    monkeypatch.setattr(pd, "read_csv", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(DataError, match=f"t.csv, line [0-9]+: more than {MAX_COMMAS} commas, expected two fields"):
        read_table(tmp_path / "t.csv")


def test_names_with_commas_are_read(tmp_path: Path) -> None:
    name = "," * MAX_COMMAS
    (tmp_path / "t.csv").write_text(f'Image_Label,EncodedPixels\n"{name[1:]}_Fish",1 1\n\n')
    assert read_table(tmp_path / "t.csv") == {(name[1:], "Fish"): "1 1"}


def test_a_long_header_is_not_printed_whole(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x" * 100_000 + "\n1\n")
    with pytest.raises(DataError, match="the header is 'xxx") as caught:
        read_table(tmp_path / "t.csv")
    assert len(str(caught.value)) < 1000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    for path in (tmp_path / "pipe.csv", Path(os.devnull)):
        with pytest.raises(DataError, match="is not a regular file"):
            read_table(path)
