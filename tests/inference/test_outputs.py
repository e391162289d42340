"""Parquet, COCO, masks, overlays and stored probabilities: other tools read them, and find the masks of the CSV."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from support.pictures import imread
from support.tiny import SMALL_GRIDS, write_jpeg

from cloudrt.cli.infer import infer
from cloudrt.inference.journal_records import Record
from cloudrt.inference.outputs import compress_counts, write_coco, write_csv
from cloudrt.inference.pipeline import Segmenter
from cloudrt.labels import CLOUDS
from cloudrt.masks.rle import rle_decode, rle_encode
from cloudrt.masks.table import read_table
from cloudrt.search.probabilities import Probabilities

GRID = SMALL_GRIDS.submit_grid
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    (folder / "sub").mkdir()
    for number, name in enumerate(("a.jpg", "sub/a.jpg", "Wölkchen 1.jpg", "z.jpg")):
        write_jpeg(folder / name, number)
    (folder / "bad.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def rows(images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    """(image, class) -> RLE of the CSV."""
    output = tmp_path_factory.mktemp("csv") / "s.csv"
    assert run(images, model, "-o", output).exit_code == 1
    return read_table(output, SMALL_GRIDS)


def run(images: Path, model: Path, *more: object) -> Result:
    words = [images, "-m", model, "--provider", "cpu", *more]
    return CliRunner().invoke(infer, [str(word) for word in words])


def test_parquet_holds_the_rows_of_the_csv(
    images: Path, model: Path, rows: dict[tuple[str, str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr("cloudrt.inference.outputs.ROW_GROUP", 4)  # several groups
    monkeypatch.chdir(tmp_path)
    assert run(images, model, "--format", "parquet").exit_code == 1
    table = pd.read_parquet(tmp_path / "submission.parquet")
    assert list(table.columns) == ["image", "label", "rle", "error"]
    assert {(row.image, row.label): row.rle for row in table.itertuples()} == rows
    assert set(table.loc[table.error.notna(), "image"]) == {"bad.jpg"}


def read_coco(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def test_coco_is_read_by_pycocotools(
    images: Path, model: Path, rows: dict[tuple[str, str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(images, model, "--format", "coco").exit_code == 1
    coco = read_coco(tmp_path / "submission.json")
    names = {category["id"]: category["name"] for category in coco.loadCats(coco.getCatIds())}
    assert list(names.values()) == list(SMALL_GRIDS.classes)
    instances = 0
    for image in coco.loadImgs(coco.getImgIds()):
        for category, label in names.items():
            wanted = rle_decode(rows[image["file_name"], label], GRID)
            total = np.zeros_like(wanted)
            for annotation in coco.loadAnns(coco.getAnnIds(image["id"], category)):
                mask = coco.annToMask(annotation)
                assert cv2.connectedComponents(mask, connectivity=8)[0] == 2  # one, and the background
                assert annotation["area"] == mask.sum() == coco_mask.area(annotation["segmentation"])
                assert annotation["bbox"] == coco_mask.toBbox(annotation["segmentation"]).tolist()
                total += mask
                instances += 1
            assert np.array_equal(total, wanted)
    assert instances > 5


@given(st.lists(st.integers(0, 300_000), min_size=1, max_size=30))
def test_counts_are_compressed_as_pycocotools_does(counts: list[int]) -> None:
    grid = (1, sum(counts) or 1)
    theirs = coco_mask.frPyObjects({"size": list(grid), "counts": counts}, *grid)["counts"]
    assert compress_counts(counts) == theirs.decode()


@pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 0), (-1, -1)])
def test_coco_of_corner_pixels(tmp_path: Path, corner: tuple[int, int]) -> None:
    mask = np.zeros(GRID, np.uint8)
    mask[corner] = 1
    record = Record("a.jpg", (rle_encode(mask), rle_encode(np.ones(GRID, np.uint8)), ""), None, 0)
    write_coco(tmp_path / "c.json", lambda: [record], SMALL_GRIDS)
    one, full = read_coco(tmp_path / "c.json").loadAnns([1, 2])
    assert np.array_equal(coco_mask.decode(one["segmentation"]), mask)
    assert coco_mask.decode(full["segmentation"]).all()


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4, unique=True))
def test_names_in_a_csv_are_quoted_as_by_the_csv_module(names: list[str]) -> None:
    texts = ("1 2", "", "5 1 9 3", "")
    records = [Record(name, texts, None, 0) for name in names]
    rows = [(f"{name}_{label}", text) for name in names for label, text in zip(CLOUDS.classes, texts, strict=True)]
    with TemporaryDirectory() as folder:
        write_csv(Path(folder) / "a.csv", lambda: records, CLOUDS)
        written = (Path(folder) / "a.csv").read_bytes().decode()
    assert list(csv.reader(io.StringIO(written, newline=""), strict=True)) == [list(CLOUDS.header), *map(list, rows)]
    wanted = io.StringIO()
    writer = csv.writer(wanted)
    for row in (CLOUDS.header, *rows):
        writer.writerow(row)
        wanted.seek(wanted.tell() - 2)
        wanted.write("\n")
        wanted.truncate()
    assert written == wanted.getvalue()


def test_coco_without_images_is_sound(tmp_path: Path) -> None:
    write_coco(tmp_path / "c.json", list, SMALL_GRIDS)
    values = json.loads((tmp_path / "c.json").read_text())
    assert values["images"] == values["annotations"] == []


def test_masks_and_overlays(images: Path, model: Path, rows: dict[tuple[str, str], str], tmp_path: Path) -> None:
    done = run(
        images, model, "-o", tmp_path / "s.csv", "--masks", tmp_path / "masks", "--overlays", tmp_path / "overlays"
    )
    assert done.exit_code == 1, done.output
    masks = {
        (path.relative_to(tmp_path / "masks" / label).as_posix().removesuffix(".png"), label): path
        for label in SMALL_GRIDS.classes
        for path in (tmp_path / "masks" / label).rglob("*.png")
    }
    assert set(masks) == set(rows)  # of the failed image too: empty
    for key, path in masks.items():
        mask = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        assert mask is not None
        assert set(np.unique(mask)) <= {0, 255}
        assert np.array_equal(mask > 0, rle_decode(rows[key], GRID) > 0), key
    overlays = {path.relative_to(tmp_path / "overlays").as_posix() for path in (tmp_path / "overlays").rglob("*.jpg")}
    assert overlays == {"a.jpg.jpg", "sub/a.jpg.jpg", "Wölkchen 1.jpg.jpg", "z.jpg.jpg"}
    picture = imread(tmp_path / "overlays" / "a.jpg.jpg")
    assert picture.shape == (*GRID, 3)
    assert picture.std() > 10
    assert not list(tmp_path.rglob("*.part"))


def test_pictures_never_leave_their_folder(images: Path, model: Path, tmp_path: Path) -> None:
    listed = tmp_path / "in" / "list.txt"
    listed.parent.mkdir()
    write_jpeg(tmp_path / "out.jpg", 1)
    for name in ("../out.jpg", str(tmp_path / "out.jpg")):
        listed.write_text(name)
        refused = run(listed, model, "-o", tmp_path / "s.csv", "--masks", tmp_path / "deep" / "masks")
        assert refused.exit_code == 2
        assert "outside the folder of" in refused.output
        assert not (tmp_path / "deep").exists()


def test_kept_probabilities_are_those_of_the_artifact(images: Path, model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.npz"
    assert run(images, model, "-o", tmp_path / "s.csv", "--save-probabilities", kept).exit_code == 1
    with Probabilities(kept) as probabilities, Segmenter(model, provider="cpu") as segmenter:
        assert sorted(probabilities.keys) == ["Wölkchen 1.jpg", "a.jpg", "sub/a.jpg", "z.jpg"]
        files = [images / key for key in probabilities.keys]
        for key, item in zip(probabilities.keys, segmenter.infer(files), strict=True):
            levels, _ = probabilities.read(key)
            assert item.probability is not None
            assert np.abs(levels.astype(int) - item.probability).max() <= 1
    refused = run(images, model, "-o", tmp_path / "t.csv", "--save-probabilities", kept, "--resume")
    assert refused.exit_code == 2
    assert "cannot be combined with --resume" in refused.output


def test_a_format_that_needs_a_package_says_so_first(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.chdir(tmp_path)
    refused = run(images, model, "--format", "parquet")
    assert refused.exit_code == 2
    assert "pip install '.[parquet]'" in refused.output
    assert not list(tmp_path.iterdir())
