"""The four pages in a real browser: no script fails, nothing is fetched, long lists are paged, pages fit on phones."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest
from cloudrt.bench.bench_page import write_bench_page
from support.browser import ask, needs_chromium, photograph
from support.commands import invoke
from support.html import Names
from support.paths import ROOT
from support.tiny import tiny_artifact

from cloudrt.cli import main
from cloudrt.labels import CLOUDS
from cloudrt.reports.submission_page import Report

STORED = ROOT / "bench" / "results" / "cpu-full-originals.json"
PAGES = ("report", "explore", "tune", "bench")
MANY = 10_000


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    model = tiny_artifact(folder / "model.onnx")
    (folder / "images").mkdir()
    for image in (scenes / "test_images").iterdir():
        (folder / "images" / image.name).write_bytes(image.read_bytes())
    (folder / "images" / "broken.jpg").write_bytes(b"no image")

    words = ("--model", model, "--provider", "cpu", "--output", folder / "report.csv", "--report")
    invoke(main, "infer", folder / "images", *words, status=1)
    invoke(main, "explore", scenes, "--output", folder / "explore.html", status=0)
    invoke(main, "tune", model, scenes, "--output", folder / "tune.onnx", status=0)
    write_bench_page(json.loads(STORED.read_text()), folder / "bench.html")
    return {name: folder / f"{name}.html" for name in PAGES}


@needs_chromium
@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [1280, 390])
def test_no_script_fails_and_nothing_is_wider_than_the_screen(
    pages: dict[str, Path], name: str, width: int, tmp_path: Path
) -> None:
    script = "return [document.documentElement.scrollWidth, innerWidth]"
    assert json.loads(ask(pages[name], tmp_path, script, width)) == [width, width]


@needs_chromium
@pytest.mark.parametrize("name", PAGES)
def test_what_scrolls_sideways_on_a_phone_has_a_hint(pages: dict[str, Path], name: str, tmp_path: Path) -> None:
    script = """
    const hint = (one) => getComputedStyle(one, "::before");
    return [...document.querySelectorAll(".scroll")].filter((one) => one.scrollWidth > one.clientWidth + 1)
        .filter((one) => hint(one).display === "none" || !hint(one).content.includes("Scroll sideways"))
        .map((one) => one.getAttribute("aria-labelledby"));
    """
    assert json.loads(ask(pages[name], tmp_path, script, 390)) == []


@needs_chromium
@pytest.mark.parametrize("name", PAGES)
def test_tables_fit_on_a_wide_screen_and_numbers_do_not_wrap_on_a_phone(
    pages: dict[str, Path], name: str, tmp_path: Path
) -> None:
    script = """
    return [...document.querySelectorAll(".scroll")].filter((one) => one.scrollWidth > one.clientWidth + 1)
        .map((one) => one.getAttribute("aria-labelledby"));
    """
    assert json.loads(ask(pages[name], tmp_path, script, 1280)) == []
    script = """
    const lines = (cell) => {
      const range = document.createRange();
      range.selectNodeContents(cell);
      return range.getBoundingClientRect().height / parseFloat(getComputedStyle(cell).lineHeight);
    };
    const numbers = [...document.querySelectorAll("td")].filter((one) => /^[\\d.,%±×–+ -]+$/.test(one.textContent));
    return [numbers.length > 3, numbers.filter((one) => lines(one) > 1.5).map((one) => one.textContent)];
    """
    assert json.loads(ask(pages[name], tmp_path, script, 390)) == [True, []]


@needs_chromium
@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [1280, 390])
def test_pictures_are_not_blank(pages: dict[str, Path], name: str, width: int, tmp_path: Path) -> None:
    photograph(pages[name], tmp_path / "seen.png", tmp_path, width, 844)
    picture = cv2.imread(str(tmp_path / "seen.png"), cv2.IMREAD_GRAYSCALE)
    assert picture is not None and picture[:, :width].std() > 10


@needs_chromium
def test_ten_thousand_failures_and_many_images_are_paged(tmp_path: Path) -> None:
    report = Report(CLOUDS, shown=MANY)
    for number in range(MANY):
        report.add(f"{number}.jpg", None, {"Fish": "1 5"}, None)
        report.add(f"broken{number}.jpg", None, None, "is empty")
    report.write(tmp_path / "report.html", {})
    script = """
    const text = (one) => one.textContent.trim();
    const bars = [...document.querySelectorAll("nav.pages")];
    const seen = [document.querySelectorAll("*").length, document.querySelectorAll(".gallery > li").length];
    const [images, failures] = bars;
    const first = text(document.querySelector(".gallery .key"));
    images.querySelectorAll("button")[1].click();
    const second = text(document.querySelector(".gallery .key"));
    const field = failures.querySelector("input");
    field.value = 200;
    field.dispatchEvent(new Event("change"));
    const row = text(document.querySelector("#failures ~ .panel tbody th"));
    images.querySelectorAll("button")[0].click();
    return [...seen, bars.length, first, second, row, text(document.querySelector(".gallery .key")),
            text(failures.querySelector("span")), failures.querySelectorAll("button")[1].disabled];
    """
    elements, shown, bars, first, second, row, again, place, last = json.loads(
        ask(tmp_path / "report.html", tmp_path, script)
    )
    assert (shown, bars) == (24, 2)
    assert elements < 2000
    assert (first, second, again) == ("0.jpg", "24.jpg", "0.jpg")
    assert (row, place, last) == (f"broken{199 * 50}.jpg", "Page 200 of 200", True)


def test_the_benchmark_page_names_noisy_stages_and_what_its_dice_compares(tmp_path: Path) -> None:
    values = json.loads(STORED.read_text())
    for stage in values["stages"]:
        noisy = stage["name"] == "end to end"
        stage["notebook"]["iqr_s"] = stage["notebook"]["median_s"] * noisy
    write_bench_page(values, tmp_path / "bench.html")
    text = (tmp_path / "bench.html").read_text(encoding="utf-8")
    assert "Noisy: end to end" in text and "Dice compares the masks with the labels" in text
    for stage in values["stages"]:
        stage["ours"]["iqr_s"] = stage["notebook"]["iqr_s"] = 0.0
    write_bench_page(values, tmp_path / "bench.html")
    assert "Noisy" not in (tmp_path / "bench.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_everything_is_named_for_screen_readers_and_nothing_is_fetched(pages: dict[str, Path], name: str) -> None:
    text = pages[name].read_text(encoding="utf-8")
    assert Names(text).wrong == []
    assert 'name="viewport"' in text and "@media" in text
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text
