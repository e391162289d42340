"""Tables, data folders and labels: valid ones are read unchanged; others give an error of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cloudrt.data.folder import open_data, read_labels
from cloudrt.errors import DataError
from cloudrt.labels import CLOUDS, Labels
from cloudrt.masks.table import read_table

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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train_images").mkdir()
    (tmp_path / "train.csv").write_bytes(HEADER + b"a.jpg_Fish,1 1\na.jpg_Sugar,\nb.jpg_Fish,2 1\n")
    return tmp_path


def test_a_sound_folder(folder: Path) -> None:
    data = open_data(str(folder))
    assert (data.root, data.labels) == (folder, CLOUDS)
    assert data.read_train() == {"a.jpg": {"Fish": "1 1", "Sugar": ""}, "b.jpg": {"Fish": "2 1"}}


def test_images_without_rows_are_negatives_unless_absences_have_rows(folder: Path) -> None:
    for name in ("a.jpg", "b.jpg", "sub/c.png"):
        (folder / "train_images" / name).parent.mkdir(exist_ok=True)
        (folder / "train_images" / name).touch()
    data = open_data(folder)
    assert list(data.read_train()) == ["a.jpg", "b.jpg"]  # a.jpg_Sugar is empty: c.png has no labels
    assert data.describe_unlisted().startswith("1 images of ")
    assert "train.csv and are ignored" in data.describe_unlisted()
    (folder / "train.csv").write_bytes(HEADER + b"a.jpg_Fish,1 1\nb.jpg_Fish,2 1\n")
    assert data.read_train() == {"a.jpg": {"Fish": "1 1"}, "b.jpg": {"Fish": "2 1"}, "sub/c.png": {}}
    assert data.describe_unlisted().endswith("are used without any class")
    (folder / "train_images" / "sub" / "c.png").unlink()
    assert data.describe_unlisted() == ""


@pytest.mark.parametrize("missing", ["train.csv", "train_images", "everything"])
def test_what_is_missing_is_named_with_where_to_get_it(folder: Path, missing: str) -> None:
    if missing == "everything":
        folder, missing = folder / "nowhere", "train.csv"
    elif missing == "train.csv":
        (folder / missing).unlink()
    else:
        (folder / missing).rmdir()
        (folder / missing).write_text("a file where a folder should be")
    with pytest.raises(DataError) as caught:
        open_data(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / missing} is missing")
    assert "kaggle competitions download" in message and f"cloudrt synth {folder}" in message
    assert len(message.splitlines()) == 1


def test_other_labels(folder: Path) -> None:
    (folder / "data.json").write_text('{"classes": ["Cat", "Dog ☁"], "label_grid": [40, 60], "submit_grid": [20, 20]}')
    (folder / "train.csv").write_bytes(HEADER + "a.jpg_Cat,1 1\na.jpg_Dog ☁,2 1\n".encode())
    data = open_data(folder)
    assert data.labels == Labels(("Cat", "Dog ☁"), (40, 60), (20, 20))
    assert data.labels.block == (2, 3)
    assert data.read_train() == {"a.jpg": {"Cat": "1 1", "Dog ☁": "2 1"}}
    (folder / "train.csv").write_bytes(HEADER + b"a.jpg_Fish,1 1\n")
    assert "Cat, Dog" in refusal(folder / "train.csv", data.labels)


def test_missing_keys_of_data_json_have_the_values_of_the_clouds(folder: Path) -> None:
    (folder / "data.json").write_text('{"classes": ["Fish"]}')
    assert read_labels(folder) == Labels(("Fish",), CLOUDS.label_grid, CLOUDS.submit_grid)
    (folder / "data.json").write_text("{}")
    assert read_labels(folder) == CLOUDS


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'"classes"',
        b"[" * 100_000,
        b'{"label_grid": [' + b"9" * 5000 + b", 1]}",
        b'{"classes": "Fish"}',
        b'{"classes": {"Fish": 1}}',
        b'{"classes": null}',
        b'{"classes": []}',
        b'{"classes": [""]}',
        b'{"classes": [1]}',
        b'{"classes": [["Fish"]]}',
        b'{"classes": ["Fish", "Fish"]}',
        b'{"classes": ["a,b"]}',
        b'{"classes": ["a_b"]}',
        b'{"classes": ["a\\nb"]}',
        b'{"classes": ["a\\"b"]}',
        b'{"label_grid": [1400]}',
        b'{"label_grid": [1400, 2100, 3]}',
        b'{"label_grid": 1400}',
        b'{"label_grid": ["1400", "2100"]}',
        b'{"label_grid": [1400.0, 2100]}',
        b'{"label_grid": [true, 525], "submit_grid": [true, 525]}',
        b'{"label_grid": [NaN, 2100]}',
        b'{"label_grid": [0, 0], "submit_grid": [0, 0]}',
        b'{"label_grid": [-1400, 2100]}',
        b'{"label_grid": [1099511627776, 1], "submit_grid": [1, 1]}',
        b'{"label_grid": [1401, 2100]}',
        b'{"submit_grid": [1400, 4200]}',
        b'{"class": ["Fish"]}',
    ],
)
def test_malformed_data_json(folder: Path, content: bytes) -> None:
    (folder / "data.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_data(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'data.json'}: ")
    assert '{"classes": [...], "label_grid": [H, W], "submit_grid": [H, W]}' in message
    assert len(message.splitlines()) == 1 and len(message) < 400 + len(str(folder))


@pytest.mark.parametrize("labels", [CLOUDS, Labels(("a", "b b"), (6, 8), (3, 2))])
def test_labels_round_trip_through_json(labels: Labels) -> None:
    values: dict[str, Any] = json.loads(json.dumps(labels.to_dict()))
    assert Labels.from_dict(values) == labels
