"""Outputs with positions over several runs: what is replaced, what is refused, and what a run leaves behind."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result
from support.files import contents
from support.placed import days_of
from support.runs import refused

from cloudrt.cli.infer import infer


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_scene(name: str) -> str:
    """Write a picture of 180x120 pixels with a bright triangle."""
    image = np.full((120, 180, 3), 30, np.uint8)
    cv2.fillConvexPoly(image, np.array([[30, 20], [150, 50], [70, 110]]), (220, 220, 220))
    assert cv2.imwrite(name, image)
    return name


def write_day(day: int) -> str:
    return write_scene(f"Aqua_2020010{day}_-61--59.2_10-11.2.png")


def run(model: Path, *words: str) -> Result:
    common = ["-m", str(model), "--provider", "cpu", "--batch-size", "2"]
    return CliRunner().invoke(infer, [*words, *common])


def test_a_run_in_which_every_image_fails_is_finished_without_a_store(here: Path, model: Path) -> None:
    words = [write_scene("nowhere.png"), "-o", "days.zarr"]
    for more in ([], ["--overwrite"]):
        done = run(model, *words, *more)
        assert done.exit_code == 1 and "days.zarr: 1 images, 0 masks, 1 failed" in done.output, done.output
        assert "No image could be segmented; the first has no position" in done.output
        left = ["days.zarr.failures.csv", "days.zarr.run.json", "nowhere.png"]
        assert sorted(path.name for path in here.iterdir()) == left
    done = run(model, *words, "--resume")
    assert done.exit_code == 0 and "days.zarr: already finished, nothing to do" in done.output, done.output
    assert run(model, write_day(1), "-o", "days.zarr").exit_code == 0  # the next day begins the store
    assert days_of(here / "days.zarr") == [1]


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_a_folder_that_is_no_store_stays_and_no_journal_is_left(here: Path, model: Path, more: list[str]) -> None:
    image = write_day(1)
    (here / "mine.zarr").mkdir()
    (here / "mine.zarr" / "notes.txt").write_text("years of work")
    before = contents(here)
    assert "mine.zarr is not a store that cloudrt-infer" in refused(run(model, image, "-o", "mine.zarr", *more))
    assert contents(here) == before


def test_overwrite_keeps_the_store_until_the_new_one_is_complete(
    here: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = write_day(1), write_day(2)
    assert run(model, first, "-o", "days.zarr").exit_code == 0
    before = contents(here / "days.zarr")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("cloudrt.geo.store.Store.append", full)
        assert "days.zarr: No space left" in refused(run(model, second, "-o", "days.zarr", "--overwrite"))
    assert contents(here / "days.zarr") == before
    assert run(model, second, "-o", "days.zarr", "--overwrite").exit_code == 0
    assert days_of(here / "days.zarr") == [2]
    assert not list(here.glob(".*"))


def test_appending_to_a_store_replaces_nothing_else(here: Path, model: Path) -> None:
    assert run(model, write_day(1), write_scene("nowhere.png"), "-o", "days.zarr").exit_code == 1
    second = write_day(2)
    (here / "days.zarr.html").write_text("mine")
    for folder in ("masks", "overlays"):
        (here / folder).mkdir()
        (here / folder / "mine.txt").write_text("mine")
    before = contents(here)
    for words, named in (
        (["--report"], "days.zarr.html exists"),
        (["--masks", "masks"], "masks is not empty"),
        (["--overlays", "overlays"], "overlays is not empty"),
    ):
        assert named in refused(run(model, second, "-o", "days.zarr", *words))
        assert contents(here) == before
    assert run(model, second, "-o", "days.zarr", "--masks", "new").exit_code == 0
    assert days_of(here / "days.zarr") == [1, 2]
    assert not (here / "days.zarr.failures.csv").exists()  # the first run wrote it


def test_resume_refuses_outlines_of_another_tolerance(here: Path, model: Path) -> None:
    words = [write_day(1), "-o", "a.geojson"]

    def corners() -> int:
        features = json.loads((here / "a.geojson").read_text())["features"]
        return sum(len(one["geometry"]["coordinates"][0]) for one in features)

    assert run(model, *words).exit_code == 0
    done = run(model, *words, "--resume", "--simplify", "0.5")  # the default
    assert done.exit_code == 0 and "already finished" in done.output
    assert "simplify was 0.5, now 0.0" in refused(run(model, *words, "--resume", "--simplify", "0"))
    few = corners()
    assert run(model, *words, "--overwrite", "--simplify", "0").exit_code == 0
    assert corners() > few


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["-o", "a.csv", "--overlap", "0.25"], "--overlap applies to tiles: it needs --tile"),
        (["-o", "a.csv", "--tile", "--simplify", "0.5"], "--simplify applies to outlines"),
        (["-o", "a.zarr", "--simplify", "0"], "--simplify applies to outlines"),
    ],
)
def test_options_without_effect_are_refused(here: Path, model: Path, words: list[str], named: str) -> None:
    image = write_day(1)
    assert named in refused(run(model, image, *words))
    assert [path.name for path in here.iterdir()] == [image]


def test_world_files_are_never_replaced(here: Path, model: Path) -> None:
    write_scene("a.png")
    (here / "a.pgw").write_text("0.01 0 0 -0.01 10 11")
    before = contents(here)
    said = refused(run(model, "a.png", "-o", "s.geojson", "--stats", "a.pgw", "--overwrite"))
    assert "a.pgw is one of the images and would be replaced" in said
    assert contents(here) == before


def test_geotiff_without_rasterio_says_so_first(here: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = dict.fromkeys(name for name in sys.modules if name.partition(".")[0] == "rasterio")
    for name in names | {"rasterio": None}:
        monkeypatch.setitem(sys.modules, name, None)
    tagged, plain = write_scene("a.tif"), write_scene("b.png")
    for words in ([tagged, "--tile"], [plain, "--tile", "--masks", "masks"]):
        line = refused(run(model, *words, "-o", "s.csv"))
        assert "rasterio is not installed: pip install '.[geo]'" in line
        assert sorted(path.name for path in here.iterdir()) == [tagged, plain]
    for words in ([tagged, "--masks", "masks"], [plain, "--tile"]):
        assert run(model, *words, "-o", "s.csv", "--overwrite").exit_code == 0
