"""Which images a run reads, and in which order: files, folders, patterns, lists, and the rows of a sample."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloudrt.errors import DataError
from cloudrt.images.inputs import list_inputs
from cloudrt.labels import Labels

LABELS = Labels(("Fish", "Flower"), (8, 8), (4, 4))


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not read")


def keys(inputs: list[Path], sample: Path | None = None) -> list[str]:
    return [file.key for file in list_inputs(inputs, sample, LABELS)]


def test_folders_are_listed_by_key_subfolders_included(tmp_path: Path) -> None:
    touch(tmp_path, "b.jpg", "a/c d.JPEG", "ä.png", "notes.txt", ".hidden.jpg")
    files = list_inputs([tmp_path], None, LABELS)
    assert [file.key for file in files] == ["a/c d.JPEG", "b.jpg", "ä.png"]
    assert [file.path for file in files] == [tmp_path / file.key for file in files]


def test_single_files_and_several_folders(tmp_path: Path) -> None:
    touch(tmp_path, "one/a.jpg", "two/b.jpg", "c.jpg")
    assert keys([tmp_path / "one", tmp_path / "c.jpg", tmp_path / "two"]) == ["a.jpg", "c.jpg", "b.jpg"]


def test_an_empty_text_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as an unset variable of a shell."""
    touch(tmp_path, "a.jpg")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="an input is an empty text"):
        list_inputs([""], None, LABELS)
    with pytest.raises(DataError, match="no inputs"):
        list_inputs([], None, LABELS)


def test_an_image_that_is_given_twice_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    (tmp_path / "list.txt").write_text("a.jpg\na.jpg\n")
    with pytest.raises(DataError, match=r"a\.jpg is given twice, .*: give each image once"):
        keys([tmp_path / "list.txt"])


def test_two_files_of_one_key_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "one/a.jpg", "two/a.jpg")
    with pytest.raises(DataError, match=r"share the key 'a\.jpg'"):
        keys([tmp_path / "one", tmp_path / "two"])


def test_nothing_to_predict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images"):
        keys([tmp_path])
    with pytest.raises(DataError, match="is missing: give a folder of images"):
        keys([tmp_path / "gone"])


def test_a_sample_decides_which_and_in_which_order(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.jpg", "in/b.jpg", "in/c.jpg")
    sample = tmp_path / "sample.csv"
    sample.write_text("Image_Label,EncodedPixels\nc.jpg_Fish,1 1\nc.jpg_Flower,\ngone.jpg_Fish,\na.jpg_Fish,\n")
    files = list_inputs([tmp_path / "in"], sample, LABELS)
    assert [file.key for file in files] == ["c.jpg", "gone.jpg", "a.jpg"]
    assert files[1].path == tmp_path / "in" / "gone.jpg"
    sample.write_text("Image_Label,EncodedPixels\n")
    with pytest.raises(DataError, match="no rows"):
        keys([tmp_path / "in"], sample)
    with pytest.raises(DataError, match="missing"):
        keys([tmp_path / "in"], tmp_path / "gone.csv")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a.jpg", "sub/a.JPG", "sub/deep/ä b.png", "sub/note.txt", ".hidden/c.jpg", "sub/.c.jpg", "[1].jpg"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "in" / "folder.jpg").mkdir()
    return tmp_path / "in"


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.jpg", ["[1].jpg", "a.jpg"]),
        ("**/*", ["[1].jpg", "a.jpg", "sub/a.JPG", "sub/deep/ä b.png"]),
        ("sub/**/*.png", ["deep/ä b.png"]),
        ("su?/a.*", ["sub/a.JPG"]),
        ("[1].jpg", ["[1].jpg"]),  # a file of that very name
    ],
)
def test_patterns(tree: Path, pattern: str, found: list[str]) -> None:
    files = list_inputs([f"{tree}/{pattern}"], None, LABELS)
    assert [file.key for file in files] == found
    assert all(file.path.is_file() for file in files)


def test_a_pattern_without_a_match_is_refused(tree: Path) -> None:
    with pytest.raises(DataError, match="matches no images"):
        list_inputs([f"{tree}/*.tiff"], None, LABELS)


def test_lists(tree: Path) -> None:
    names = ["sub/deep/ä b.png", "a.jpg", "gone.jpg"]
    (tree / "list.txt").write_text("\ufeff" + "\r\n".join([*names, "", "  "]), encoding="utf-8")
    files = list_inputs([tree / "list.txt"], None, LABELS)
    assert [file.key for file in files] == names  # in the list's order
    assert [file.path for file in files] == [tree / name for name in names]
    (tree / "list.txt").write_text("a.jpg\na.jpg\n")
    with pytest.raises(DataError, match="share the key"):
        list_inputs([tree / "list.txt"], None, LABELS)
    (tree / "list.txt").write_text("\n")
    with pytest.raises(DataError, match="names no images"):
        list_inputs([tree / "list.txt"], None, LABELS)
    (tree / "list.txt").write_bytes(b"a\xff.jpg")
    with pytest.raises(DataError, match="not a list in UTF-8"):
        list_inputs([tree / "list.txt"], None, LABELS)
