"""Data folders and data.json: valid ones are read unchanged; others give an error of one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cloudrt.data.folder import open_data, read_labels
from cloudrt.errors import DataError
from cloudrt.labels import CLOUDS, Labels

HEADER = b"Image_Label,EncodedPixels\n"


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
    with pytest.raises(DataError, match="Cat, Dog"):
        data.read_train()


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
