"""The report: totals, a fair sample, everything escaped, nothing fetched, and missing files shown as such."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest
from support.html import Page

from cloudrt.data.scenes import draw_scene
from cloudrt.images.resize import display_size
from cloudrt.labels import CLOUDS, Labels
from cloudrt.masks.rle import rle_encode
from cloudrt.reports.page import percent, trace
from cloudrt.reports.submission_page import LISTED_FAILURES, Report

NOTHING = dict.fromkeys(CLOUDS.classes, "")
SMALL = Labels(("cat", "dog"), (40, 60), (20, 30))


def mask_text(labels: Labels, top: int, left: int, bottom: int, right: int) -> str:
    mask = np.zeros(labels.submit_grid, np.uint8)
    mask[top:bottom, left:right] = 1
    return rle_encode(mask)


def written(report: Report, path: Path, facts: dict[str, str] | None = None) -> Page:
    report.write(path / "report.html", facts or {})
    assert [file.name for file in path.iterdir() if file.suffix in (".html", ".part")] == ["report.html"]
    return Page(path / "report.html")


def test_totals(tmp_path: Path) -> None:
    report = Report(SMALL)
    whole, half = mask_text(SMALL, 0, 0, 20, 30), mask_text(SMALL, 0, 0, 10, 30)
    report.add("a.jpg", None, {"cat": whole, "dog": half}, None)
    report.add("b.jpg", None, {"cat": half, "dog": ""}, None)
    report.add("c.jpg", None, {"cat": "", "dog": ""}, None)
    report.add("d.jpg", None, None, "is empty")
    assert (report.images, report.failed, report.rows_with_mask) == (4, 1, 3)
    cat, dog = report.totals["cat"], report.totals["dog"]
    assert (cat.images, cat.area, cat.histogram) == (2, 900, [0, 0, 0, 0, 0, 1, 0, 0, 0, 1])
    assert (dog.images, dog.area) == (1, 300)
    assert report.together.tolist() == [[2, 1], [1, 1]]
    page = written(report, tmp_path)
    for shown in ("66.7%", "75.0%", "33.3%", "50.0%", "16.7%"):  # shares of images, mean areas, shares of pixels
        assert shown in page.text


def test_images_outlines_and_labels(tmp_path: Path) -> None:
    scene = draw_scene(1, (140, 210))
    cv2.imwrite(str(tmp_path / "scene.jpg"), scene.image[..., ::-1])
    report = Report(CLOUDS)
    report.add("scene.jpg", tmp_path / "scene.jpg", NOTHING | {"Fish": mask_text(CLOUDS, 35, 50, 175, 300)}, None)
    page = written(report, tmp_path, {"Provider": "cpu"})
    (image,) = page.find("image")
    assert str(image["href"]).startswith("data:image/jpeg;base64,/9j/")
    scenes = [svg for svg in page.find("svg") if svg.get("class") == "scene"]
    assert [svg["aria-label"] for svg in scenes] == ["scene.jpg: Fish 19.0%"]
    halo, outline = page.find("path")
    assert halo["d"] == outline["d"] == "M50 35L50 174L299 174L299 35Z"
    assert "Provider" in page.text and "cpu" in page.text


def test_nothing_is_fetched_or_executed(tmp_path: Path) -> None:
    report = Report(CLOUDS)
    report.add("a.jpg", None, NOTHING | {"Sugar": "1 500"}, None)
    page = written(report, tmp_path)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "object"})
    assert not re.search(r"https?://|url\(|@import", page.source)


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>&amp;\'.jpg'
    report = Report(Labels(("<b>&", "dog's"), (40, 60), (20, 30)))
    report.add(evil, tmp_path / evil.replace("/", "-"), {"<b>&": "1 5", "dog's": "1 600"}, None)
    report.add(evil, None, None, evil)
    page = written(report, tmp_path, {evil: evil})
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags and page.text.count(evil) == 5
    assert page.text.count("<b>&") >= 3


def test_vanished_file_is_shown_as_missing(tmp_path: Path) -> None:
    report = Report(CLOUDS)
    report.add("gone.jpg", tmp_path / "gone.jpg", NOTHING | {"Fish": "1 3"}, None)
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    report.add("cut.jpg", tmp_path / "cut.jpg", NOTHING, None)
    page = written(report, tmp_path)
    assert page.text.count("No picture:") == 2 and not page.find("image")
    assert len(page.find("path")) == 2  # the outlines are drawn nevertheless


def test_no_images_all_failed_and_no_masks(tmp_path: Path) -> None:
    assert "There were no images" in written(Report(CLOUDS), tmp_path).text
    failed = Report(CLOUDS)
    for number in range(LISTED_FAILURES + 100):
        failed.add(f"{number}.jpg", None, None, "is empty")
    page = written(failed, tmp_path)
    assert "Every image failed" in page.text and "report.failures.csv lists all" in page.text
    assert page.text.count("is empty") == LISTED_FAILURES
    empty = Report(CLOUDS)
    empty.add("a.jpg", None, NOTHING, None)
    page = written(empty, tmp_path)
    assert "No image failed" in page.text and "no class" in page.text and not page.find("path")
    none = Report(CLOUDS, shown=0)
    none.add("a.jpg", None, NOTHING, None)
    assert "No images were requested" in written(none, tmp_path).text


@pytest.mark.parametrize(
    "labels",
    [
        Labels(("one",), (7, 5), (7, 5)),
        Labels(tuple(f"class {n}" for n in range(30)), (4000, 8), (2000, 8)),
    ],
)
def test_any_classes_on_any_grid(labels: Labels, tmp_path: Path) -> None:
    report = Report(labels)
    report.add("a", None, dict.fromkeys(labels.classes, "1 2 9 1"), None)
    page = written(report, tmp_path)
    assert len(page.find("path")) == 2 * len(labels.classes)


def test_a_key_that_is_not_utf8(tmp_path: Path) -> None:
    report = Report(CLOUDS)
    report.add("caf\udce9.jpg", None, NOTHING, None)
    assert "caf?.jpg" in written(report, tmp_path).text


def test_sample_is_fair_and_the_same_each_time() -> None:
    def sample(images: int) -> list[int]:
        report = Report(CLOUDS, shown=20)
        for number in range(images):
            report.add(str(number), None, NOTHING, "is empty" if number % 10 == 9 else None)
        return sorted(int(sampled.key) for sampled in report._sample)

    keys = sample(4000)
    assert keys == sample(4000) and len(set(keys)) == 20
    assert not [key for key in keys if key % 10 == 9]
    assert 1000 < np.mean(keys) < 3000 and max(keys) > 2500
    assert sample(10) == list(range(9))


def test_memory_stays_flat() -> None:
    report = Report(CLOUDS)

    def feed(images: int) -> int:
        for number in range(images):
            report.add(
                f"{number}.jpg", None, {"Fish": f"{number + 1} 3"}, f"fault {number}" if number % 3 == 0 else None
            )
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        early, late = feed(3 * LISTED_FAILURES), feed(10_000)
    finally:
        tracemalloc.stop()
    assert late - early < 20_000


def test_failed_write_leaves_the_old_page(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    report = Report(SMALL)
    report.add("a", None, {"cat": "1 601"}, None)  # beyond the grid: found when the page is written
    with pytest.raises(ValueError, match="out of bounds"):
        report.write(path, {})
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_the_label_lies_inside_the_largest_part() -> None:
    mask = np.zeros((60, 90), np.uint8)
    mask[0, :] = 1
    mask[20:60, 10:50] = 1
    mask[30:34, 20:24] = 0  # a hole has an outline too
    outline = trace(2, mask)
    assert outline.index == 2 and outline.path.count("M") == 3
    x, y = outline.label
    assert mask[int(y), int(x)] == 1 and 20 <= y < 60
    assert trace(0, np.eye(1, dtype=np.uint8)).label == (0, 0)


def test_sizes_and_percentages() -> None:
    assert display_size((350, 525), 700) == (467, 700) and display_size((1, 9000), 256) == (1, 256)
    assert [percent(share) for share in (0, 1e-6, 0.5, 1)] == ["0%", "<0.1%", "50.0%", "100.0%"]
