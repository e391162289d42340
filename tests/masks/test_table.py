"""Tables of RLE rows: valid ones are read unchanged, others give a one-line error; files that need much memory."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest

from cloudrt.errors import DataError
from cloudrt.labels import CLOUDS, Labels
from cloudrt.masks.table import MAX_COMMAS, read_table

HEADER = b"Image_Label,EncodedPixels\n"


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    return tmp_path / "train.csv"


def refusal(path: Path, labels: Labels = CLOUDS) -> str:
    """Return the error of reading a table: one line, which names the file."""
    with pytest.raises(DataError) as caught:
        read_table(path, labels)
    message = str(caught.value)
    assert str(path) in message
    assert message == message.strip() and len(message.splitlines()) == 1
    return message


def test_a_sound_table_keeps_its_order(csv: Path) -> None:
    csv.write_bytes(HEADER + b"b.jpg_Sugar,1 3 10 5\na.jpg_Fish,\nsub/c_d.jpg_Gravel,7 1\n")
    assert list(read_table(csv).items()) == [
        (("b.jpg", "Sugar"), "1 3 10 5"),
        (("a.jpg", "Fish"), ""),
        (("sub/c_d.jpg", "Gravel"), "7 1"),
    ]
    assert read_table(str(csv)) == read_table(csv)


@pytest.mark.parametrize(
    "content",
    [
        HEADER.replace(b"\n", b"\r\n") + b"a.jpg_Fish,1 1\r\n",
        b"\xef\xbb\xbf" + HEADER + b"a.jpg_Fish,1 1\n",
        HEADER + b'"a.jpg_Fish","1 1"\n',
        HEADER + b"a.jpg_Fish,1 1",
        HEADER + b"\na.jpg_Fish,1 1\n\n\n",
    ],
    ids=["CRLF", "byte order mark", "quotes", "no last line break", "blank lines"],
)
def test_other_ways_to_write_the_same_table(csv: Path, content: bytes) -> None:
    csv.write_bytes(content)
    assert read_table(csv) == {("a.jpg", "Fish"): "1 1"}


def test_words_that_pandas_reads_as_missing_are_text(csv: Path) -> None:
    csv.write_bytes(HEADER + b"NaN_Fish,NA\nnull_Fish,\n")
    assert read_table(csv) == {("NaN", "Fish"): "NA", ("null", "Fish"): ""}


def test_names_that_need_quotes(csv: Path) -> None:
    csv.write_bytes(HEADER + '"a, b.jpg_Fish",1 1\n"c""d".jpg_Fish,\nwölkchen ☁.jpg_Fish,2 1\n'.encode())
    assert [name for name, _ in read_table(csv)] == ["a, b.jpg", 'c"d.jpg', "wölkchen ☁.jpg"]


def test_a_header_alone_is_an_empty_table(csv: Path) -> None:
    csv.write_bytes(HEADER)
    assert read_table(csv) == {}


@pytest.mark.parametrize(
    "header",
    [
        b"image,mask\n",
        b"ImageId,EncodedPixels\n",
        b"EncodedPixels,Image_Label\n",
        b"Image_Label\n",
        b"\n",
        b"Image_Label,EncodedPixels,Width\n",
        b"a.jpg_Fish,1 1\n",
        b"image_label,encodedpixels\n",
    ],
)
def test_another_header(csv: Path, header: bytes) -> None:
    csv.write_bytes(header)
    assert "expected 'Image_Label,EncodedPixels'" in refusal(csv) or header == b"\n"


@pytest.mark.parametrize("key", ["a.jpg_Cat", "a.jpg", "_Fish", "a.jpg_", "a.jpg_fish", "a.jpg_Fish ", "Fish"])
def test_an_unknown_class_is_named_by_its_line(csv: Path, key: str) -> None:
    csv.write_bytes(HEADER + f"a.jpg_Fish,1 1\n\n{key},1 1\n".encode())
    message = refusal(csv)
    assert "line 4" in message and repr(key) in message and "Fish, Flower, Gravel, Sugar" in message


def test_duplicate_rows(csv: Path) -> None:
    csv.write_bytes(HEADER + b"a.jpg_Fish,1 1\nb.jpg_Fish,\na.jpg_Fish,\n")
    message = refusal(csv)
    assert "line 4: 'a.jpg_Fish' occurs twice" in message


@pytest.mark.parametrize(
    "rows",
    [b"a.jpg_Fish,1 1,x\n", b"a,b.jpg_Fish,1 1\na,c.jpg_Fish,1 1\n", b"a.jpg_Fish,1 1\nb.jpg_Fish,1,2\n"],
    ids=["in the first row", "in every row", "in a later row"],
)
def test_rows_of_more_fields(csv: Path, rows: bytes) -> None:
    csv.write_bytes(HEADER + rows)
    assert "Image_Label,EncodedPixels" in refusal(csv)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Image_Label,EncodedPixels"),
        (b"\n\n", ""),
        (HEADER + b"a\xe9.jpg_Fish,1 1\n", "UTF-8"),
        ((HEADER + b"a.jpg_Fish,1 1\n").decode().encode("utf-16"), "UTF-8"),
        (HEADER + b'"a.jpg_Fish,1 1\n', "CSV"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\xff", "UTF-8"),
        (b"PK\x03\x04" + bytes(40), ""),
    ],
    ids=["empty", "blank", "Latin-1", "UTF-16", "open quote", "picture", "archive"],
)
def test_what_is_no_table(csv: Path, content: bytes, reason: str) -> None:
    csv.write_bytes(content)
    assert reason in refusal(csv)


def test_no_such_table(tmp_path: Path) -> None:
    assert "is missing" in refusal(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    assert "CSV" in refusal(tmp_path / "folder.csv")


def test_nothing_is_downloaded() -> None:
    with pytest.raises(DataError, match="is missing"):
        read_table("http://127.0.0.1:9/train.csv")


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
