"""The report of panoramas: pictures with outlines, and maps of the frequencies over several days."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from support.browser import ask, needs_chromium
from support.html import Page
from support.tiny import SMALL_GRIDS

import cloudrt
from cloudrt.geo.frequency_maps import FrequencyMaps
from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.geo.positions import Position
from cloudrt.masks.postprocess import encode_mask

CLASSES = ("Fish", "Sugar")


def add(maps: FrequencyMaps, day: int, west: float, mask: NDArray[np.uint8], no_data: NDArray[np.uint8]) -> None:
    """Add a panorama of 0.1 degrees per pixel whose top is 10 degrees north; only Fish covers something."""
    position = Position(west, 10, 0.1, 0.1, date=datetime.date(2020, 1, day))
    place = MaskGrid((mask.shape[0], mask.shape[1]), position, no_data=encode_mask(no_data))
    maps.add({"Fish": encode_mask(mask), "Sugar": ""}, place)


@pytest.mark.parametrize("west", [-61.0, 178.0])
def test_frequencies_are_those_of_a_plain_loop(west: float) -> None:
    random = np.random.default_rng(0)
    maps = FrequencyMaps(CLASSES)
    on, known = np.zeros((2, 6, 10)), np.zeros((2, 6, 10))
    for day in range(2):
        mask = (random.random((30, 50)) < 0.4).astype(np.uint8)
        no_data = (random.random((30, 50)) < 0.3).astype(np.uint8)
        no_data[:5, :5] = 1
        add(maps, day + 1, west, mask, no_data)
        for row in range(6):
            for column in range(10):
                cell = slice(5 * row, 5 * row + 5), slice(5 * column, 5 * column + 5)
                known[day, row, column] = (no_data[cell] == 0).sum()
                on[day, row, column] = ((no_data[cell] == 0) & (mask[cell] == 1)).sum()
    found, lat, lon = maps.frequencies()
    with np.errstate(invalid="ignore"):
        exact = (on.sum(axis=0) / known.sum(axis=0))[::-1]
    assert np.isnan(found[0, -1, 0]) and np.nanmax(np.abs(found[0] - exact)) < 1e-12
    assert np.isnan(found[0]).sum() == 1 and np.nanmax(found[1]) == 0
    assert (lat[0], lat[-1]) == (7, 10) and len(lat) == 7 and len(lon) == 11
    assert (lon[0], lon[-1]) == (west, west + 5)


def test_a_belt_around_the_earth_begins_at_the_date_line() -> None:
    maps = FrequencyMaps(CLASSES)
    mask = np.zeros((30, 3600), np.uint8)
    mask[:, 1800:] = 1
    for day in (1, 2):
        add(maps, day, -180 + 360 * (day - 1), mask, mask * 0)
    found, _, lon = maps.frequencies()
    assert (lon[0], lon[-1]) == (-180, 180) and (found[0, :, :360] == 0).all() and (found[0, :, 360:] == 1).all()
    pictures = maps.draw()
    assert pictures and pictures.wide and pictures.days == 2 and list(pictures.pictures) == list(CLASSES)
    image = cv2.imdecode(np.frombuffer(pictures.pictures["Fish"], np.uint8), cv2.IMREAD_COLOR)
    assert image is not None and image.shape[1] > 3 * image.shape[0]
    middle = image[image.shape[0] // 2]  # dark violet in the west, yellow in the east; blue, green, red
    assert (np.abs(middle[400:700].astype(int) - (84, 1, 68)) < 4).all()
    assert (np.abs(middle[1100:1400].astype(int) - (37, 231, 253)) < 4).all()


def test_maps_need_two_days_in_degrees_and_data_on_one_of_them() -> None:
    maps = FrequencyMaps(CLASSES)
    full = np.ones((30, 50), np.uint8)
    add(maps, 1, 0, full, full * 0)
    texts = {"Fish": encode_mask(full), "Sugar": ""}
    maps.add(texts, MaskGrid((30, 50)))
    maps.add(texts, MaskGrid((30, 50), Position(0, 10, 0.1, 0.1)))
    maps.add(texts, MaskGrid((30, 50), Position(0, 10, 1, 1, "EPSG:3857", date=datetime.date(2020, 1, 2))))
    assert maps.draw() is None
    add(maps, 2, 0, full, full)  # without data
    assert maps.draw() is not None
    unknown = FrequencyMaps(CLASSES)
    for day in (1, 2):
        add(unknown, day, 0, full, full)
    assert unknown.draw() is None


@pytest.fixture(scope="module")
def report(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of three panoramas in which a bright rectangle becomes narrower day by day."""
    folder = tmp_path_factory.mktemp("report") / "in"
    folder.mkdir()
    for day in (1, 2, 3):
        image = np.full((200, 1200, 3), 30, np.uint8)
        image[40:100, 100 * day : 600] = 220
        assert cv2.imwrite(str(folder / f"x2020010{day}_10-22_0-2.png"), image)
    cloudrt.infer(folder, folder.with_name("a.csv"), model, provider="cpu", tile=True, report=True)
    one = folder / "x20200101_10-22_0-2.png"
    cloudrt.infer(one, folder.with_name("one.csv"), model, provider="cpu", tile=True, report=True)
    return folder.with_name("a.html")


def test_the_report_shows_panoramas_and_maps(report: Path) -> None:
    page = Page(report)
    scenes = [one for one in page.find("svg") if one.get("class") == "scene"]
    assert [one["viewbox"] for one in scenes] == ["0 0 600 100"] * 3
    assert [(one["width"], one["height"]) for one in page.find("image")] == [("600", "100")] * 3
    paths = [one for one in page.find("path") if one.get("class") == "outline"]
    assert len(paths) == 9 and str(paths[0]["d"]).startswith("M50 20L50 49L299 49L299 20Z")
    maps = page.find("img")
    assert [one["alt"] for one in maps] == [f"Map of the frequency of {name}" for name in SMALL_GRIDS.classes]
    assert all(str(one["src"]).startswith("data:image/png;base64,") for one in maps)
    assert "over 3 days" in page.text and "the grid of each image" in page.text
    assert "12.5%" in page.text and "10.0%" in page.text  # areas of the first day, and of all
    assert not Page(report.with_name("one.html")).find("img")


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_panoramas_scroll_and_the_page_does_not(report: Path, tmp_path: Path, width: int) -> None:
    script = """
    const boxes = [...document.querySelectorAll(".panorama .scroll")];
    const line = document.querySelector(".panorama .outline:not(.halo)");
    const scale = document.querySelector(".scene").getScreenCTM().a;
    return [document.documentElement.scrollWidth, innerWidth, boxes.length,
            Math.min(...boxes.map((one) => one.firstElementChild.getBoundingClientRect().width)),
            parseFloat(getComputedStyle(line).strokeWidth) * scale];
    """
    page_width, screen, boxes, narrowest, line = json.loads(ask(report, tmp_path, script, width))
    assert page_width <= screen and boxes == 6
    assert narrowest >= (1100 if width == 1280 else 850)
    assert 0.8 < line < 2.5  # CSS pixels
