"""The page about a data set: its figures equal plain counts, and every invalid row and image is found."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from support.html import Page
from support.pictures import imread

from cloudrt.cli.explore import explore as command
from cloudrt.data.duplicates import difference_hash, similar_groups
from cloudrt.data.explore import Exploration, explore
from cloudrt.data.folder import open_data
from cloudrt.labels import CLOUDS
from cloudrt.masks.rle import rle_decode, rle_encode


def run(data: Path, output: Path, *more: str) -> Result:
    return CliRunner().invoke(command, [str(data), "-o", str(output), "--threads", "2", *more])


def truth(data: Path) -> dict[str, dict[str, np.ndarray]]:
    """Image -> class -> mask on the label grid, by a loop over the rows."""
    frame = pd.read_csv(data / "train.csv", keep_default_na=False)
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, text in frame.itertuples(index=False):
        name, label = key.rsplit("_", 1)
        found.setdefault(name, {})[label] = rle_decode(text, CLOUDS.label_grid)
    return found


@pytest.fixture(scope="module")
def explored(scenes: Path) -> Exploration:
    return explore(open_data(scenes), 2)


def test_figures_are_those_of_a_plain_count(scenes: Path, explored: Exploration) -> None:
    masks = truth(scenes)
    present = np.array([[masks[name][label].any() for label in CLOUDS.classes] for name in masks])
    assert [image.name for image in explored.images] == list(masks)
    np.testing.assert_array_equal(explored.present, present)
    assert explored.classes_per_image == [int((present.sum(axis=1) == number).sum()) for number in range(5)]
    with np.errstate(invalid="ignore", divide="ignore"):
        wanted = np.corrcoef(present.T.astype(float))
    np.testing.assert_allclose(explored.correlation(), wanted, atol=1e-12, equal_nan=True)
    for summary in explored.images:
        for share, label in zip(summary.shares, CLOUDS.classes, strict=True):
            # Shares are measured on the submission grid; one of its pixels covers 16 pixels of the label grid.
            assert abs(share - masks[summary.name][label].mean()) < 2e-3
        image = imread(scenes / "train_images" / summary.name)
        assert summary.size == image.shape[:2]
        assert abs(summary.no_data - (image.max(axis=2) <= 8).mean()) < 0.02
    for index, label in enumerate(CLOUDS.classes):
        areas = [mask[label].mean() for mask in masks.values() if mask[label].any()]
        assert sum(explored.area_histogram(index)) == len(areas)
    assert sum(explored.no_data_histogram()) == len(masks)


def test_positions_are_the_mean_mask(scenes: Path, explored: Exploration) -> None:
    masks = truth(scenes)
    for index, label in enumerate(CLOUDS.classes):
        total = np.sum([mask[label] for mask in masks.values()], axis=0).astype(float)
        height, width = explored.positions[index].shape
        wanted = total.reshape(height, 1400 // height, width, 2100 // width).mean(axis=(1, 3))
        np.testing.assert_allclose(explored.positions[index], wanted, atol=0.5)
        assert abs(explored.positions[index].mean() - total.mean()) < 0.01


def spoil(scenes: Path, data: Path) -> list[str]:
    """Copy a data set with one of everything that can be wrong with it; return the names of its images."""
    shutil.copytree(scenes, data)
    table, images = data / "train.csv", data / "train_images"
    lines = table.read_text(encoding="utf-8").splitlines()
    names = list(dict.fromkeys(line.split(",")[0].rsplit("_", 1)[0] for line in lines[1:]))
    rows = dict(line.split(",") for line in lines[1:])
    full = np.zeros(CLOUDS.label_grid, np.uint8)
    full[:700] = 1
    almost = full.copy()
    almost[:20] = 0
    rows |= {
        f"{names[0]}_Fish": "1 5 3 2",
        f"{names[0]}_Flower": "7",
        f"{names[0]}_Gravel": "1 x",
        f"{names[0]}_Sugar": "2940000 2",
        f"{names[1]}_Fish": "1 2",
        f"{names[1]}_Sugar": rle_encode(np.ones(CLOUDS.label_grid, np.uint8)),
        f"{names[2]}_Fish": rle_encode(full),
        f"{names[2]}_Flower": rle_encode(almost),
        f"{names[2]}_Gravel": "",
        f"{names[2]}_Sugar": rle_encode(np.pad(np.ones((40, 2100), np.uint8), ((1360, 0), (0, 0)))),
        "gone.jpg_Fish": "",
        "odd.jpg_Cat": "1 2",
        "no-class": "1 2",
    }
    del rows[f"{names[3]}_Fish"]
    lines = ["Image_Label,EncodedPixels", *(f"{key},{text}" for key, text in rows.items()), f"{names[4]}_Fish,1 4"]
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    image = imread(images / names[2])
    image[: len(image) // 2] = 0
    cv2.imwrite(str(images / names[2]), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    shutil.copy(images / names[5], images / names[6])
    (images / names[7]).write_bytes((images / names[7]).read_bytes()[:3000])
    brighter = cv2.convertScaleAbs(imread(images / names[8]), alpha=1.03)
    cv2.imwrite(str(images / names[9]), brighter, [cv2.IMWRITE_JPEG_QUALITY, 95])
    cv2.imwrite(str(images / names[10]), imread(images / names[10])[:100])
    shutil.copy(images / names[0], images / "extra.jpg")
    return names


def test_the_audit_follows_the_data(scenes: Path, tmp_path: Path) -> None:
    """If all masks are small, a small mask is no finding; if no row is empty, a missing row is no finding."""
    shutil.copytree(scenes, tmp_path / "data")
    names = sorted(path.name for path in (tmp_path / "data" / "train_images").iterdir())
    small, tiny = np.zeros(CLOUDS.label_grid, np.uint8), np.zeros(CLOUDS.label_grid, np.uint8)
    small[:80, :80] = tiny[:12, :12] = 1
    rows = [f"{name}_Fish,{rle_encode(tiny if name == names[1] else small)}" for name in names[:-2]]
    (tmp_path / "data" / "train.csv").write_text("\n".join(["Image_Label,EncodedPixels", *rows]) + "\n")
    found = explore(open_data(tmp_path / "data"))
    kinds = [
        one for one in found.findings if one.kind in ("Missing row", "Image without a row") or "covers" in one.reason
    ]
    assert [(one.kind, one.key) for one in kinds] == [("Suspicious mask", f"{names[1]}_Fish")]
    assert "covers only 0.0049% of the image; the median of Fish is 0.22%" in kinds[0].reason
    assert [image.name for image in found.images] == names
    assert found.classes_per_image[0] == 2


def test_progress_counts_images_without_a_row(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []

    @contextmanager
    def bar(_description: str, total: int) -> Iterator[Callable[[int], None]]:
        shown.append(total)
        yield lambda n: shown.append(-n)

    monkeypatch.setattr("cloudrt.cli.explore.progress_bar", bar)
    # The first table has no empty row, so images without rows are used; the second table has one.
    for name, text, total in (("rare", "1 9000", 12), ("all", "", 1)):
        shutil.copytree(scenes, tmp_path / name)
        key = min(path.name for path in (tmp_path / name / "train_images").iterdir())
        rows = ["Image_Label,EncodedPixels", f"{key}_Fish,1 9000", f"{key}_Sugar,{text}"]
        (tmp_path / name / "train.csv").write_text("\n".join(rows) + "\n")
        shown.clear()
        assert run(tmp_path / name, tmp_path / f"{name}.html").exit_code == 0
        assert shown == [total] + [-1] * total


def test_everything_that_is_wrong_is_found(scenes: Path, tmp_path: Path) -> None:
    names = spoil(scenes, tmp_path / "data")
    done = run(tmp_path / "data", tmp_path / "page.html", "--findings", str(tmp_path / "all.csv"), "--show", names[2])
    assert done.exit_code == 0, done.output
    with (tmp_path / "all.csv").open(encoding="utf-8") as file:
        found = {(row["kind"], row["key"], row["reason"]): row["line"] for row in csv.DictReader(file)}

    def has(kind: str, key: str, reason: str) -> bool:
        return any(one[:2] == (kind, key) and re.search(reason, one[2]) for one in found)

    for label, reason in (("Fish", "overlaps"), ("Flower", "odd"), ("Gravel", "'x'"), ("Sugar", "out of bounds")):
        assert has("Invalid row", f"{names[0]}_{label}", reason)
    assert found["Invalid row", f"{names[0]}_Fish", next(r for k, n, r in found if n == f"{names[0]}_Fish")] == "2"
    assert has("Invalid row", "odd.jpg_Cat", "does not end in _CLASS with a class of Fish, Flower, Gravel, Sugar")
    assert has("Invalid row", "no-class", "does not end in _CLASS")
    assert has("Invalid row", f"{names[4]}_Fish", r"repeats line \d+")
    assert has("Missing row", names[3], "has no row for Fish")
    assert has("Missing row", "gone.jpg", "has no row for Flower, Gravel, Sugar")
    assert has("Unreadable image", "gone.jpg", "No such file")
    assert has("Unreadable image", names[7], "truncated|damaged")
    assert has("Suspicious mask", f"{names[1]}_Fish", "vanishes on the submission grid")
    assert has("Suspicious mask", f"{names[1]}_Sugar", "covers 100% of the image")
    assert has("Suspicious mask", f"{names[2]}_Fish", r"has \d+% of its area where the image has no data")
    assert has("Suspicious mask", f"{names[2]}_Flower", r"is almost identical to the mask of Fish \(IoU 0\.9\d\)")
    assert not has("Suspicious mask", f"{names[2]}_Sugar", "no data")
    assert has("Image without a row", "extra.jpg", "is not in train.csv")
    assert has("Duplicate", names[6], f"is the same file as {names[5]}")
    assert has("Duplicate", names[9], f"looks almost like {names[8]}")
    assert has("Different size", names[10], "is 210x100, most images are 210x140")
    page = Page(tmp_path / "page.html")
    assert names[2] in page.text and "of its area where" in page.text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page.source)
    assert "<script" not in page.source


def test_a_sound_data_set_has_no_wrong_rows(scenes: Path, tmp_path: Path) -> None:
    done = run(scenes, tmp_path / "page.html", "--images", "3")
    assert done.exit_code == 0
    assert "12 images" in done.output
    assert not re.search("Invalid|Missing|Unreadable|without a row", done.output)
    assert Page(tmp_path / "page.html").text.count(".jpg") >= 3


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        (lambda data: None, ["--show", "nothing.jpg"], "not in train.csv; its images have names such as"),
        (lambda data: None, ["--findings", "{output}"], "is both --output and --findings"),
        (lambda data: (data / "train.csv").write_text("Image_Label,EncodedPixels\n"), [], "names no image"),
        (lambda data: (data / "train.csv").write_text("a,b\n"), [], "the header is"),
        (lambda data: (data / "train.csv").unlink(), [], "train.csv is missing"),
    ],
)
def test_what_cannot_be_explored_gives_a_one_line_error(scenes: Path, tmp_path: Path, change, words, said) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(scenes, tmp_path / "data")
    change(tmp_path / "data")
    output = tmp_path / "page.html"
    done = run(tmp_path / "data", output, *(word.format(output=output) for word in words))
    assert done.exit_code == 2 and said in done.output and done.output.count("\n") == 1
    assert not output.exists()


def test_an_output_that_exists_is_kept(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("mine")
    done = run(scenes, tmp_path / "page.html")
    assert done.exit_code == 2 and "exists: give another --output, or --overwrite" in done.output
    assert (tmp_path / "page.html").read_text() == "mine"


@pytest.mark.parametrize("name", ["train.csv", "data.json", "train_images/x.html"])
@pytest.mark.parametrize("option", ["--output", "--findings"])
def test_explore_never_replaces_what_it_reads(scenes: Path, tmp_path: Path, name: str, option: str) -> None:
    shutil.copytree(scenes, tmp_path / "data")
    target = tmp_path / "data" / name
    before = target.read_bytes() if target.exists() else None
    others = [] if option == "--output" else ["-o", str(tmp_path / "page.html")]
    done = CliRunner().invoke(command, [str(tmp_path / "data"), option, str(target), "--overwrite", *others])
    assert done.exit_code == 2
    assert "would be replaced" in done.output or "belongs to the data set" in done.output
    assert (target.read_bytes() if target.exists() else None) == before
    assert not (tmp_path / "page.html").exists()


def test_the_hash_has_a_bit_for_each_step_to_a_brighter_value() -> None:
    image = np.zeros((64, 90, 3), np.uint8)
    assert difference_hash(image) == 0
    image[:, 50:] = 200
    assert difference_hash(image).bit_count() == 8  # one step in each of 8 rows


def test_groups_are_joined_through_their_members() -> None:
    """They are the connected components that a depth-first search finds."""
    random = np.random.default_rng(0)
    seeds = random.integers(0, 2**63, 20, np.uint64)
    hashes = [
        int(value) ^ (1 << int(bit)) ^ (1 << int(other))
        for value in seeds
        for bit, other in random.integers(0, 64, (4, 2))
    ]
    order = random.permutation(len(hashes))
    hashes = [hashes[index] for index in order]
    groups = similar_groups(hashes)
    seen: dict[int, int] = {}
    number = 0
    for begin in range(len(hashes)):
        if begin in seen:
            continue
        stack = [begin]
        while stack:
            one = stack.pop()
            if one in seen:
                continue
            seen[one] = number
            stack += [other for other, value in enumerate(hashes) if (value ^ hashes[one]).bit_count() <= 5]
        number += 1
    wanted = np.array([seen[index] for index in range(len(hashes))])
    assert len(np.unique(groups)) == number
    np.testing.assert_array_equal(groups[:, None] == groups[None], wanted[:, None] == wanted[None])
