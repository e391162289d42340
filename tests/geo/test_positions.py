"""Positions: each source, the precedence of sources, and contradictions."""

from __future__ import annotations

import datetime
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from cloudrt.errors import DataError, ImageError
from cloudrt.geo.bounds import parse_bounds
from cloudrt.geo.positions import Position, check_degrees, read_position

NAME = "Aqua_CorrectedReflectance20071227_-61--40_10-24"
DAY = datetime.date(2007, 12, 27)
SIZE = (1400, 2100)


def write_tiff(path: Path, west: float, north: float, pixel: float, crs: str = "EPSG:4326") -> Path:
    import rasterio
    from rasterio.transform import from_origin

    transform = from_origin(west, north, pixel, pixel)
    profile = {"driver": "GTiff", "height": 20, "width": 30, "count": 3, "dtype": "uint8"}
    with rasterio.open(path, "w", crs=crs, transform=transform, **profile) as file:
        file.write(np.full((3, 20, 30), 90, np.uint8))
    return path


def test_the_name_states_bounds_and_date(tmp_path: Path) -> None:
    found = read_position(tmp_path / f"{NAME}.jpeg", SIZE)
    assert found and found.source == "file name" and found.date == DAY and found.crs == "EPSG:4326"
    assert found.bounds(SIZE) == pytest.approx((-61, 10, -40, 24))
    assert found.pixel_width == pytest.approx(0.01) and found.pixel_height == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("20200229_-180-180_-15-15", (-180, -15, 180, 15)),
        ("x_170--170_-5-5", (170, -5, 190, 5)),  # across the date line
        ("x_0.5-2.5_-1.25--0.25", (0.5, -1.25, 2.5, -0.25)),
    ],
)
def test_other_names(tmp_path: Path, name: str, bounds: tuple[float, ...]) -> None:
    size = round((bounds[3] - bounds[1]) * 100), round((bounds[2] - bounds[0]) * 100)
    found = read_position(tmp_path / f"{name}.png", size)
    assert found and found.bounds(size) == pytest.approx(bounds)
    assert found.wraps(size[1]) == (bounds[2] - bounds[0] == 360)


def test_without_a_position(tmp_path: Path) -> None:
    assert read_position(tmp_path / "0a1b2c3.jpg", SIZE) is None
    assert read_position(tmp_path / "snapshot-2015-01-01T00_00_00Z.jpg", SIZE) is None


def test_the_order_of_the_sources(tmp_path: Path) -> None:
    bounds = (100.0, 0.0, 103.0, 2.0)
    image = tmp_path / "d20071227_-61--58_10-12.jpg"
    by_name = read_position(image, (200, 300))
    by_bounds = read_position(image, (200, 300), bounds)
    image.with_suffix(".wld").write_text("0.01\n0\n0\n-0.01\n20.005\n9.995\n")
    by_world = read_position(image, (200, 300), bounds)
    image.with_suffix(".jgw").write_text("0.01\n0\n0\n-0.01\n30.005\n9.995\n")
    by_jgw = read_position(image, (200, 300), bounds)
    assert by_name and by_bounds and by_world and by_jgw
    assert [found.source for found in (by_name, by_bounds, by_world, by_jgw)] == [
        "file name",
        "bounds",
        "world file .wld",
        "world file .jgw",
    ]
    assert [found.west for found in (by_name, by_bounds, by_world, by_jgw)] == pytest.approx([-61, 100, 20, 30])
    assert by_world.north == pytest.approx(10)
    assert {found.date for found in (by_name, by_bounds, by_world, by_jgw)} == {DAY}
    tiff = write_tiff(tmp_path / "d20071227_-61--58_10-12.tif", -20, 5, 0.02)
    by_tags = read_position(tiff, (20, 30), bounds)
    assert by_tags and by_tags.source == "GeoTIFF tags"
    assert by_tags.bounds((20, 30)) == pytest.approx((-20, 4.6, -19.4, 5))


def test_a_png_has_a_pgw(tmp_path: Path) -> None:
    (tmp_path / "a.pgw").write_text("0.02 0 0 -0.02 10.01 4.99")
    found = read_position(tmp_path / "a.png", (50, 100))
    assert found and found.bounds((50, 100)) == pytest.approx((10, 4, 12, 5))


def test_a_world_file_of_any_size_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "a.pgw").open("wb") as file:
        file.write(b"0.02 0 0 -0.02 10.01 4.99\n")
        file.truncate(100 * 2**30)
    with pytest.raises(ImageError, match="that is not six numbers"):
        read_position(tmp_path / "a.png", (50, 100))


def test_any_reference_system(tmp_path: Path) -> None:
    found = read_position(write_tiff(tmp_path / "a.tif", 500_000, 1_000_000, 1000.0, "EPSG:32620"), (20, 30))
    assert found and found.crs == "EPSG:32620" and found.pixel_width == 1000
    assert found.pixel_width * found.degrees_per_unit == pytest.approx(1 / 111.195)
    assert not found.wraps(30)


@pytest.mark.parametrize(
    "crs", ['LOCAL_CS["deck",UNIT["metre",1]]', "EPSG:4978"], ids=["a local system", "coordinates in space"]
)
def test_reference_systems_that_are_not_maps_are_refused(tmp_path: Path, crs: str) -> None:
    with pytest.raises(ImageError, match="no readable GeoTIFF tags"):
        read_position(write_tiff(tmp_path / "a.tif", 500_000, 1_000_000, 1000.0, crs), (20, 30))


@pytest.mark.parametrize(
    ("crs", "half", "reason"),
    [
        ("+proj=geos +h=35785831 +lon_0=0 +sweep=y", 3e6, ""),
        # Only the corners are outside the Earth.
        ("+proj=geos +h=35785831 +lon_0=0 +sweep=y", 5e6, "reaches beyond the part of the Earth"),
        ("+proj=ortho", 4e6, ""),
        ("+proj=ortho", 5e6, "reaches beyond the part of the Earth"),
        ("EPSG:3832", 5e6, ""),
        ('LOCAL_CS["deck",UNIT["metre",1]]', 1.0, "without longitudes and latitudes"),
    ],
)
def test_every_point_needs_a_longitude(crs: str, half: float, reason: str) -> None:
    position = Position(-half, half, half / 10, half / 5, crs)
    with pytest.raises(ImageError, match=reason) if reason else nullcontext():
        check_degrees(position, (10, 20))


@pytest.mark.parametrize(
    ("west", "north", "outside"),
    [(-180, 90, False), (-180, 89.5, False), (180, 90, False), (-180, 95, True), (-180, -80, True), (1000, 20, True)],
)
def test_degrees_of_another_datum_lie_on_the_earth(west: float, north: float, outside: bool) -> None:
    """PROJ returns longitudes and latitudes of NAD83 unchanged, whatever they are."""
    position = Position(west, north, 1.2, 0.9, "EPSG:4269")
    expected = pytest.raises(ImageError, match="reaches beyond the part") if outside else nullcontext()
    with expected:
        check_degrees(position, (200, 300))


def test_a_pixel_in_grads(tmp_path: Path) -> None:
    found = read_position(write_tiff(tmp_path / "a.tif", 0, 50, 1.0, "EPSG:4807"), (20, 30))
    assert found and found.degrees_per_unit == pytest.approx(0.9)


@pytest.mark.parametrize("text", ["1e-15 0 0 -1e-15 179.99 20", "5e-324 0 0 -5e-324 0 0"])
def test_pixels_smaller_than_the_precision_of_numbers(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.pgw").write_text(text)
    with pytest.raises(ImageError, match="too small to place"):
        read_position(tmp_path / "a.png", (50, 100))


def test_a_tiff_without_tags_goes_by_its_name(tmp_path: Path) -> None:
    import cv2

    path = tmp_path / "x20071227_0-0.3_0-0.2.tif"
    cv2.imwrite(str(path), np.full((20, 30, 3), 90, np.uint8))
    found = read_position(path, (20, 30))
    assert found and found.source == "file name"


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        (NAME, (1400, 2000), "2000x1400 pixels, which do not fit 21 degrees"),
        ("x20071227_-61--40_24-10", SIZE, r"north \(10\) is not above south"),
        ("x20071332_-61--40_10-24", SIZE, "20071332 in its name"),
        ("x_-61--40_80-94", SIZE, "outside the Earth"),
        ("x_-261--240_10-24", SIZE, "outside the Earth"),
    ],
)
def test_names_that_contradict_themselves(tmp_path: Path, name: str, size: tuple[int, int], reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        read_position(tmp_path / f"{name}.jpg", size)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("one two three", "a.jgw, that is not six numbers"),
        ("0.01 0 0 -0.01 20", "not six numbers"),
        ("0.01 0 0 0.01 20 10", "north below south"),
        ("-0.01 0 0 -0.01 20 10", "east left of west"),
        ("0.01 0.005 0.005 -0.01 20 10", "is rotated"),
        ("nan 0 0 -0.01 20 10", "not finite"),
        ("0.01 0 0 -0.01 20 100", "outside the Earth"),
        ("1 0 0 -0.01 -170 10", "more than 360"),
        ("0.01 0 0 -0.01 500000 4000000", "outside the Earth"),
    ],
)
def test_invalid_world_files_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "a.jgw").write_text(text)
    with pytest.raises(ImageError, match=reason):
        read_position(tmp_path / "a.jpg", (300, 400), (0, 0, 4, 3))


def test_bounds_on_the_command_line() -> None:
    assert parse_bounds("-61,10,-40,24") == (-61, 10, -40, 24)
    for text, reason in (
        ("1,2,3", "LON1,LAT1,LON2,LAT2"),
        ("a,b,c,d", "LON1,LAT1,LON2,LAT2"),
        ("-61,24,-40,10", "is not above"),
        ("-61,10,-61,24", "the same"),
        ("-200,10,-40,24", "outside the Earth"),
        ("0,-91,10,0", "outside the Earth"),
        ("nan,0,10,10", "outside the Earth"),
    ):
        with pytest.raises(DataError, match=reason):
            parse_bounds(text)


def test_a_position_round_trips_through_json() -> None:
    position = Position(-61, 24, 0.04, 0.04, date=DAY)
    assert Position.from_dict(position.to_dict()) == position
    with pytest.raises(DataError):
        Position.from_dict({"west": 1})
