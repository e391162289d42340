"""GeoJSON answers: polygons in pixels, or in degrees for images with a position, as `cloudrt-infer` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from support.browser import needs_chromium
from support.chromium import browsing
from support.server import Answer, Server, serving
from support.tiny import SMALL_GRIDS, tiny_artifact, write_jpeg

import cloudrt
from cloudrt.inference.pipeline import Segmenter
from cloudrt.masks.rle import rle_decode
from cloudrt.masks.rule import Rule
from cloudrt.serve import geojson

SIZE, GRID = (120, 180), (60, 90)
RULES = (Rule(110, 4), Rule(120, 9), Rule(127, 0))
PLACED = "Aqua_20200102_-61.8--60_10-11.2.jpg"  # 180x120 pixels at 100 per degree: one field of view
ACCEPT = {"Accept": "application/geo+json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    tiny_artifact(folder / "clouds.onnx", SIZE, SMALL_GRIDS, rules=RULES, field_of_view=SIZE)
    write_jpeg(folder / "images" / PLACED, 3, SIZE)
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> bytes:
    return (folder / "images" / PLACED).read_bytes()


def upload(server: Server, files: list[tuple[str, bytes]], query: str = "") -> Answer:
    return server.upload(f"/v1/segment{query}", files, ACCEPT)


def drawn(features: list[dict[str, Any]], label: str) -> NDArray[np.uint8]:
    """Return the mask of a class: the pixels whose centres lie in its polygons."""
    from shapely import STRtree, points
    from shapely.geometry import shape

    rows, columns = np.mgrid[: GRID[0], : GRID[1]]
    tree = STRtree([shape(one["geometry"]) for one in features if one["properties"]["pattern"] == label])
    mask = np.zeros(GRID, np.uint8)
    inside, _ = tree.query(points(columns.ravel() + 0.5, rows.ravel() + 0.5), predicate="within")
    mask.ravel()[inside] = 1
    return mask


def test_polygons_in_pixels_are_the_masks(server: Server, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geojson, "SIMPLIFY", 0.0)
    answer = server.ask("/v1/segment", data, ACCEPT)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/geo+json")
    assert answer.json["type"] == "FeatureCollection" and answer.json["grid"] == [60, 90]
    assert answer.json["images"] == [{"image": "image-0", "error": None, "coordinates": "pixels", "position": None}]
    (plain,) = server.ask("/v1/segment?levels=true", data).json["images"]
    features = answer.json["features"]
    assert len(features) > 3
    for label in SMALL_GRIDS.classes:
        mask = rle_decode(plain["classes"][label]["rle"], GRID)
        np.testing.assert_array_equal(drawn(features, label), mask)
        areas = [one["properties"]["area_pixels"] for one in features if one["properties"]["pattern"] == label]
        assert sum(areas) == mask.sum() and len(areas) == cv2.connectedComponents(mask)[0] - 1


def test_components_have_their_mean_probability(server: Server, segmenter: Segmenter, data: bytes) -> None:
    (inferred,) = segmenter.infer([data])
    assert inferred.probability is not None
    found = server.ask("/v1/segment?class=Flower", data, ACCEPT).json["features"]
    assert {one["properties"]["pattern"] for one in found} == {"Flower"}
    levels = np.ascontiguousarray(inferred.probability[1].T)
    count, numbers = cv2.connectedComponents((levels > 120).astype(np.uint8))
    expected = {
        (int((numbers == one).sum()), round(float(levels[numbers == one].mean()) / 255, 4))
        for one in range(1, count)
        if (numbers == one).sum() > 9
    }
    assert {(one["properties"]["area_pixels"], one["properties"]["probability"]) for one in found} == expected


def test_rings_have_the_orientation_of_the_standard(server: Server, data: bytes) -> None:
    """Exterior rings counter-clockwise, holes clockwise (RFC 7946, 3.1.6), in the plane of the coordinates."""
    from shapely.geometry import shape

    for one in upload(server, [("a.jpg", data), (PLACED, data)]).json["features"]:
        geometry = shape(one["geometry"])
        assert geometry.is_valid
        for part in getattr(geometry, "geoms", [geometry]):
            assert part.exterior.is_ccw and not any(hole.is_ccw for hole in part.interiors)


def test_the_name_places_an_image_as_infer_does(server: Server, folder: Path, data: bytes, tmp_path: Path) -> None:
    cloudrt.infer(folder / "images", tmp_path / "a.geojson", folder / "clouds.onnx", provider="cpu", batch_size=2)
    expected = json.loads((tmp_path / "a.geojson").read_text())["features"]
    answer = upload(server, [(PLACED, data)])
    assert answer.json["features"] == expected and expected
    assert expected[0]["properties"]["date"] == "2020-01-02" and expected[0]["properties"]["area_km2"] > 0
    assert answer.json["images"][0] | {"image": ""} == {
        "image": "",
        "error": None,
        "coordinates": "degrees",
        "position": "file name",
    }


def test_bounds_and_tags_place_an_image(server: Server, data: bytes, tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    by_name = upload(server, [(PLACED, data)]).json["features"]
    by_bounds = server.ask("/v1/segment?bounds=-61.8,10,-60,11.2", data, ACCEPT).json
    assert by_bounds["images"][0]["position"] == "bounds"
    assert [one["geometry"] for one in by_bounds["features"]] == [one["geometry"] for one in by_name]
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert pixels is not None
    transform = rasterio.transform.from_origin(-61.8, 11.2, 0.01, 0.01)
    path = tmp_path / "a.tif"
    with rasterio.open(
        path, "w", "GTiff", width=180, height=120, count=3, dtype="uint8", crs="EPSG:4326", transform=transform
    ) as file:
        file.write(pixels[..., ::-1].transpose(2, 0, 1))
    by_tags = server.ask("/v1/segment?bounds=0,0,1.8,1.2", path.read_bytes(), ACCEPT).json
    assert by_tags["images"][0]["position"] == "GeoTIFF tags"
    for one, other in zip(by_tags["features"], by_name, strict=True):
        assert one["properties"]["area_km2"] == pytest.approx(other["properties"]["area_km2"])


def test_a_wrong_position_is_a_failure(server: Server, data: bytes) -> None:
    wrong = "Aqua_20200102_-61.8--60_11.2-10.jpg"
    answer = upload(server, [(wrong, data)])
    assert answer.status == 422 and "contradicts itself" in answer.json["detail"]
    assert "do not fit" in server.ask("/v1/segment?bounds=0,0,1,9", data, ACCEPT).json["detail"]
    both = upload(server, [(wrong, data), (PLACED, data), ("empty.jpg", b"")])
    assert both.status == 200
    assert [bool(one["error"]) for one in both.json["images"]] == [True, False, True]
    assert {one["properties"]["image"] for one in both.json["features"]} == {PLACED}
    assert server.upload("/v1/segment", [(wrong, data)]).status == 200  # JSON has no positions


def test_a_tiff_that_names_other_files_is_not_read(server: Server, tmp_path: Path) -> None:
    """GDAL also reads XML that names other files; only TIFF files may reach it."""
    text = b"II<VRTDataset rasterXSize='1' rasterYSize='1'><SRS>EPSG:4326</SRS></VRTDataset>"
    assert upload(server, [("a.tif", text)]).status == 422


def test_changed_rules(server: Server, segmenter: Segmenter, data: bytes) -> None:
    from urllib.parse import quote

    from cloudrt.masks.postprocess import apply_rules

    (inferred,) = segmenter.infer([data])
    assert inferred.probability is not None
    changed = apply_rules(inferred.probability, (RULES[0], Rule(60, 30), RULES[2]), None)
    query = quote(json.dumps({"Flower": {"threshold": 60, "min_area": 30}}))
    (answer,) = server.ask(f"/v1/segment?rules={query}", data).json["images"]
    assert [answer["classes"][label]["rle"] for label in SMALL_GRIDS.classes] == changed
    found = server.ask(f"/v1/segment?rules={query}&class=Flower", data, ACCEPT).json["features"]
    assert sum(one["properties"]["area_pixels"] for one in found) == rle_decode(changed[1], GRID).sum()


def test_without_the_extra_it_is_501(server: Server, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geojson, "_PACKAGES", ("rasterio", "no_such_package"))
    answer = server.ask("/v1/segment", data, ACCEPT)
    assert answer.status == 501
    assert answer.json == {
        "detail": "application/geo+json needs no_such_package: pip install '.[geo]' in the checkout of cloudrt"
    }
    assert server.ask("/v1/segment", data).status == 200


@needs_chromium
def test_the_page_downloads_polygons_of_its_rules(
    segmenter: Segmenter, folder: Path, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with browsing(tmp_path / "profile") as page, serving(segmenter) as server:
        page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        page.open(server.url, 390)
        page.choose("#files", [folder / "images" / PLACED])
        page.until("cards.length === 1 && cards[0].levels")
        page.run("{ const one = find('threshold-1'); one.value = 60; one.dispatchEvent(new Event('input')); }")
        page.run("cards[0].outlines.click()")
        page.until("find('status').textContent.endsWith('downloaded.')")
        page.wait_for(tmp_path / f"{PLACED}.geojson")
        query = "?rules=%7B%22Flower%22:%7B%22threshold%22:60%7D%7D"
        assert json.loads((tmp_path / f"{PLACED}.geojson").read_text()) == upload(server, [(PLACED, data)], query).json
        assert page.complaints == []
        assert page.run("document.documentElement.scrollWidth") == 390
    monkeypatch.setattr(geojson, "_PACKAGES", ("no_such_package",))
    with serving(segmenter) as server:
        assert "data-geojson" not in server.ask("/").body.decode()
