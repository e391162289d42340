"""What a command may write: never what it reads, never two outputs to one file, existing files only on request."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.files import contents

from cloudrt.errors import DataError
from cloudrt.images.inputs import list_inputs, searched_folders
from cloudrt.labels import CLOUDS
from cloudrt.system.paths import check_outputs, check_pictures


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model and a folder of images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"model")
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.jpg"):
        (tmp_path / "in" / name).write_bytes(name.encode())
    return tmp_path


READS = {"--model": Path("model.onnx"), "input in": Path("in"), "--sample": None}
IMAGES = [Path("in/a.jpg"), Path("in/sub/b.jpg")]


def refusal(*words: object, **more: object) -> str:
    before = contents(Path())
    with pytest.raises(DataError) as caught:
        check_outputs(*words, **more)  # type: ignore[arg-type]
    assert contents(Path()) == before
    return str(caught.value)


def test_new_outputs_are_accepted_and_nothing_is_made(here: Path) -> None:
    before = sorted(here.rglob("*"))
    files = {"--output": Path("new/deep/s.csv"), "--stats": here / "stats.json", "the report": None}
    check_outputs(files, READS, folders={"--masks": Path("masks"), "--overlays": None}, images=IMAGES)
    check_outputs({"--output": Path("in/s.csv")}, READS, images=IMAGES)  # beside the images, not over them
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("path", ["model.onnx", "./in/../model.onnx", "in", "in/"])
def test_an_output_is_never_an_input(path: str, overwrite: bool) -> None:
    said = refusal({"--output": Path(path)}, READS, overwrite=overwrite)
    assert f"{Path(path)} would be replaced: it is both " in said
    assert "--output" in said and ("--model" in said or "input in" in said)


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to], ids=["symbolic", "hard"])
def test_a_link_to_an_input_is_that_input(here: Path, link: Callable[[Path, Path], None]) -> None:
    link(here / "link", here / "model.onnx")
    said = refusal({"--output": Path("link")}, READS, overwrite=True)
    assert "link would be replaced: it is both --model and --output" in said
    link(here / "picture", here / "in" / "sub" / "b.jpg")
    said = refusal({"the page of --stats": Path("picture")}, READS, images=IMAGES, overwrite=True)
    assert "b.jpg is one of the images and would be replaced: give another --stats" in said


def test_a_folder_behind_a_link_is_that_folder(here: Path) -> None:
    (here / "other").symlink_to("in")
    assert "both input in and --masks" in refusal({}, READS, folders={"--masks": Path("other")}, overwrite=True)
    assert "is one of the images" in refusal({"--output": Path("other/a.jpg")}, {}, images=IMAGES, overwrite=True)
    assert "both --output and --stats" in refusal({"--output": Path("in/s"), "--stats": Path("other/s")}, {})


@pytest.mark.parametrize("target", ["in/a.jpg", "in", "missing"])
def test_links_below_an_output_folder_are_refused(here: Path, target: str) -> None:
    (here / "masks" / "deep").mkdir(parents=True)
    check_outputs({}, READS, folders={"--masks": Path("masks")}, images=IMAGES, overwrite=True)
    (here / "masks" / "deep" / "a.jpg").symlink_to(here / target)
    said = refusal({}, READS, folders={"--masks": Path("masks")}, images=IMAGES, overwrite=True)
    assert "masks/deep/a.jpg is a link" in said and "give another --masks" in said


def test_a_link_to_itself_is_no_file_and_no_folder(here: Path) -> None:
    Path("loop").symlink_to("loop")
    Path("broken").symlink_to("nowhere")
    assert "loop (--output) is not a regular file" in refusal({"--output": Path("loop")}, READS, overwrite=True)
    for name in ("loop", "broken"):
        assert "is not a folder" in refusal({}, READS, folders={"--masks": Path(name)}, overwrite=True)


def test_a_link_to_nowhere_is_a_new_file(here: Path) -> None:
    (here / "dangling").symlink_to("later.csv")
    check_outputs({"--output": Path("dangling")}, READS)
    said = refusal({"--output": Path("dangling"), "--stats": Path("later.csv")}, READS)
    assert "both --output and --stats" in said


@pytest.mark.parametrize("other", ["s.csv", "./s.csv", "in/../s.csv", "S.CSV", "s.CSV"])
def test_two_outputs_are_never_one_file(other: str) -> None:
    """Names that differ in case alone are one file on the file systems of macOS and Windows."""
    said = refusal({"--output": Path("s.csv"), "--stats": Path(other)}, READS)
    assert f"{Path(other)} would be replaced: it is both --output and --stats" in said
    assert "both --masks and --overlays" in refusal({}, folders={"--masks": Path("m"), "--overlays": Path("M")})
    assert "both --output and --masks" in refusal({"--output": Path("m")}, folders={"--masks": Path("m")})


@pytest.mark.parametrize("name", ["a.csv/b.json", "A.csv/deep/b.json", "link/b.json"])
def test_nothing_lies_below_a_file_or_a_store_that_is_written(here: Path, name: str) -> None:
    (here / "link").symlink_to("a.csv")
    inner = {"--other": Path(name)}
    for outer, more in ((inner | {"--output": Path("a.csv")}, {}), (inner, {"stores": {"--output": Path("a.csv")}})):
        assert f"{name} (--other) lies below --output a.csv: use another" in refusal(outer, **more)
    assert "below --output a.csv" in refusal({"--output": Path("a.csv")}, folders=inner)
    assert "below --output a.csv" in refusal({}, inner, stores={"--output": Path("a.csv")}, overwrite=True)
    check_outputs(inner, folders={"--masks": Path("a.csv")})


def test_an_output_may_differ_from_an_input_in_case_alone(here: Path) -> None:
    """If the file system is case-sensitive. Two outputs whose names differ in case alone are refused everywhere."""
    if (here / "MODEL.ONNX").exists():
        assert "both --model and --output" in refusal({"--output": Path("MODEL.ONNX")}, READS, overwrite=True)
        return
    check_outputs({"--output": Path("MODEL.ONNX")}, READS)
    said = refusal({"--output": Path("MODEL.ONNX"), "--stats": Path("Model.onnx")}, READS)
    assert "both --output and --stats" in said


@pytest.mark.parametrize("folder", ["in", "in/sub", "."])
def test_a_folder_with_input_images_is_not_filled(folder: str) -> None:
    said = refusal(
        {}, {"--model": Path("model.onnx")}, folders={"--masks": Path(folder)}, images=IMAGES, overwrite=True
    )
    assert "--masks" in said and "contains input images" in said


def test_a_folder_beside_the_images_is_filled(here: Path) -> None:
    (here / "in-masks").mkdir()
    check_outputs({}, READS, folders={"--masks": Path("in-masks"), "--overlays": Path("in/new")}, images=IMAGES)


@pytest.mark.parametrize(
    ("inputs", "name", "found"),
    [
        ("in", "in/sub/a.png", True),
        ("in", "in/link/a.png", False),
        ("link", "in/a.png", False),
        ("link", "out/a.png", True),
        (".", "a.png", True),
        (".", ".hidden/a.png", False),
        ("in/a.jpg", "in/a.png", False),
        ("in/*.jpg", "in/sub/a.jpg", False),
        ("**/*.png", "sub/a.png", True),
        ("in/s*/*.png", "in/sub/a.png", True),
        ("in/s*/*.png", "out/a.png", False),
    ],
)
def test_pictures_are_refused_where_later_runs_would_read_them(here: Path, inputs: str, name: str, found: bool) -> None:
    (here / "out").mkdir()
    for folder in (here, here / "in"):
        (folder / "link").symlink_to(here / "out")
    searched = searched_folders([inputs])
    if found:
        with pytest.raises(DataError, match="later runs would read it"):
            check_pictures({"--masks": Path(name)}, searched)
    else:
        check_pictures({"--masks": Path(name)}, searched)
    before = _listed(inputs)
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).touch()
    assert (_listed(inputs) > before) == found


def test_all_that_a_pattern_can_match_is_searched() -> None:
    """From Python 3.13 on, the files in subfolders match ** too."""
    assert searched_folders([f"{Path(__file__).parent}/**"]) == [Path(__file__).parent]


def _listed(inputs: str) -> set[str]:
    try:
        return {file.key for file in list_inputs([inputs], None, CLOUDS)}
    except DataError:  # no images yet
        return set()


def test_what_exists_is_replaced_with_overwrite_alone(here: Path) -> None:
    (here / "s.csv").write_text("old")
    (here / "full").mkdir()
    (here / "full" / "x.png").write_bytes(b"")
    (here / "empty").mkdir()
    outputs = {"--output": Path("s.csv")}
    assert refusal(outputs, READS) == "s.csv exists: give another --output, or `overwrite=True`"
    assert "s.csv exists: give another `output`, or `overwrite=True`" in refusal({"the report": Path("s.csv")}, READS)
    assert "full is not empty: give another --masks" in refusal({}, READS, folders={"--masks": Path("full")})
    check_outputs(outputs, READS, folders={"--masks": Path("full")}, overwrite=True)
    check_outputs({}, READS, folders={"--masks": Path("empty")})


def test_files_are_files_and_folders_are_folders(here: Path) -> None:
    (here / "folder").mkdir()
    (here / "file").write_bytes(b"")
    assert "folder (--output) is not a regular file" in refusal({"--output": Path("folder")}, READS, overwrite=True)
    assert "file (--masks) is not a folder" in refusal({}, READS, folders={"--masks": Path("file")}, overwrite=True)
    if hasattr(os, "mkfifo"):
        os.mkfifo(here / "pipe")
        assert "is not a regular file" in refusal({"--output": Path("pipe")}, READS, overwrite=True)


@pytest.mark.parametrize("name", ["file/s.csv", "file/deep/s.csv"])
def test_a_place_inside_a_file_cannot_be_written(here: Path, name: str) -> None:
    (here / "file").write_bytes(b"")
    said = refusal({"--output": Path(name)}, READS)
    assert f"{name} cannot be written: " in said and "is not a folder" in said
    assert "cannot be written" in refusal({}, READS, folders={"--masks": Path(name)})


def test_a_folder_without_permission_cannot_be_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor can folders in it be made. The superuser may write anywhere, so that the system's answer is simulated."""
    (here / "locked").mkdir()
    real = os.access

    def access(path: Path, mode: int) -> bool:
        return real(path, mode) and not (Path(path).name == "locked" and mode & os.W_OK)

    monkeypatch.setattr(os, "access", access)
    for name in ("locked/s.csv", "locked/new/s.csv"):
        said = refusal({"--output": Path(name)}, READS)
        assert f"{name} cannot be written: no permission to write to {here / 'locked'}" in said
    assert "no permission" in refusal({}, READS, folders={"--masks": Path("locked/masks")})


def test_images_that_are_gone_do_not_matter(here: Path) -> None:
    (here / "s.csv").write_text("old")
    images = [Path("in/gone.jpg"), Path("nowhere/x.jpg"), Path("in/a\0b.jpg")]
    check_outputs({"--output": Path("s.csv")}, READS, images=images, overwrite=True)
