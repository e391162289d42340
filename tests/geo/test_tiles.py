"""Tiles of one panorama: positions, resampling to the resolution of training, areas without data, and limits."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from support.tiled import INPUT, VIEW, tiled_model, write_picture
from support.tiny import SMALL_GRIDS, tiny_artifact

import cloudrt
from cloudrt.data.scenes import draw_scene
from cloudrt.errors import ImageError
from cloudrt.geo import tiles
from cloudrt.geo.tiles import open_panorama
from cloudrt.geo.tiling import Tiling, offsets
from cloudrt.images import image
from cloudrt.images.image import load_image
from cloudrt.images.resize import resize
from cloudrt.masks.rle import rle_decode
from cloudrt.model.artifact import read_artifact


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiled_model(tmp_path_factory.mktemp("model"))


def test_a_jpeg_is_decoded_once_at_a_small_scale(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_picture(tmp_path / "a.jpg", draw_scene(1, (480, 1440)).image)
    decoded: list[tuple[int, ...]] = []
    before = image.decode

    def decode(*arguments: object, **options: object) -> NDArray[np.uint8]:
        found = before(*arguments, **options)  # type: ignore[arg-type]
        decoded.append(found.shape)
        return found

    monkeypatch.setattr(tiles, "decode", decode)
    cloudrt.infer(path, tmp_path / "a.csv", model, provider="cpu", tile=True)
    assert decoded == [(300, 900, 3)]  # 5/8: at 4/8, 60 rows of a tile would not cover the network's 64
    panorama = open_panorama(path, read_artifact(model), Tiling(0.25), 10**6)
    whole = before(path.read_bytes(), (300, 900))
    last, second = panorama.tiles[-1], panorama.tiles[1]
    assert (last.x % 8, last.y % 8) == (0, 0) and (last.x + VIEW[1], last.y + VIEW[0]) == (1440 + 4, 480)
    assert second.x == 0 and (panorama.cut(second) == resize(whole[second.y * 5 // 8 :][:75, :113], INPUT)).all()


@pytest.mark.parametrize("overlap", [0, 0.1, 0.25, 0.5])
@pytest.mark.parametrize(
    ("length", "view", "align"),
    [(36000, 2100, 8), (3000, 1400, 8), (2092, 1050, 8), (1999, 50, 8), (181, 180, 8), (180, 180, 8)],
)
@pytest.mark.parametrize("wraps", [False, True])
def test_tiles_cover_everything(length: int, view: int, align: int, overlap: float, wraps: bool) -> None:
    found = offsets(length, view, align, overlap, wraps)
    assert found[0] == 0 and all(at % align == 0 for at in found)
    gaps = np.diff([*found, length]) if wraps else np.diff(found)
    assert (gaps <= view * (1 - overlap) + align).all() and (gaps <= view).all()
    assert wraps or length <= found[-1] + view < length + align


def test_images_are_resampled_to_the_resolution_of_training(tmp_path: Path) -> None:
    """At 50 pixels per degree instead of 100, the grid is that of an image with twice as many rows and columns."""
    path = write_picture(tmp_path / "x20200101_0-4_0-3.png", draw_scene(3, (150, 200)).image)
    model = tiny_artifact(tmp_path / "m.onnx", INPUT, SMALL_GRIDS, field_of_view=VIEW)
    panorama = open_panorama(path, read_artifact(model), Tiling(), 10**6)
    assert panorama.place.grid == (150, 200)
    position = panorama.place.position
    assert position and position.bounds(panorama.place.grid) == pytest.approx((0, 0, 4, 3))
    part = draw_scene(3, (150, 200)).image[:60, :90]
    assert (panorama.cut(panorama.tiles[0]) == load_image(part, INPUT)).all()
    fine = write_picture(tmp_path / "y20200101_0-2_0-1.5.jpg", draw_scene(3, (300, 400)).image)  # 200 per degree
    panorama = open_panorama(fine, read_artifact(model), Tiling(), 10**6)
    position = panorama.place.position
    assert panorama.place.grid == (75, 100) and position
    assert position.bounds(panorama.place.grid) == pytest.approx((0, 0, 2, 1.5))
    last = panorama.tiles[-1]
    assert (last.x, last.y) == (200 - 176, 150 - 120 + 2) and len(panorama.tiles) == 4
    whole = image.decode(fine.read_bytes(), (80, 107))  # at 3/8, a tile covers the network's input
    assert (panorama.cut(panorama.tiles[0]) == resize(whole[:90, :135], INPUT)).all()


def test_black_swaths_are_no_data(tmp_path: Path, model: Path) -> None:
    image = np.full((300, 500, 3), 60, np.uint8)
    image[:, 200:240] = 3
    panorama = open_panorama(write_picture(tmp_path / "a.png", image), read_artifact(model), Tiling(), 10**6)
    no_data = rle_decode(panorama.place.no_data, panorama.place.grid)
    assert no_data[:, 100:120].all() and no_data.sum() == 150 * 20


def test_opening_a_tiff_leaves_the_log_level(tmp_path: Path, model: Path) -> None:
    path = write_picture(tmp_path / "a.tif", np.full((120, 180, 3), 60, np.uint8))
    before = cv2.utils.logging.getLogLevel()
    try:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_FATAL)
        open_panorama(path, read_artifact(model), Tiling(), 10**6)
        assert cv2.utils.logging.getLogLevel() == cv2.utils.logging.LOG_LEVEL_FATAL
    finally:
        cv2.utils.logging.setLogLevel(before)


def test_very_small_pixels_take_little_memory(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """400x400 pixels that count as one pixel of the training images: a tile would have 72,000x48,000 of them."""
    path = write_picture(tmp_path / "a.png", np.full((400, 400, 3), 200, np.uint8))
    path.with_suffix(".pgw").write_text("1e-6 0 0 -1e-6 10 10")
    panorama = open_panorama(path, read_artifact(model), Tiling(), 10**6)
    tile = panorama.cut(panorama.tiles[0])
    assert tile.shape == (*INPUT, 3) and tile[0, 0].min() > 50 and not tile[2:].any() and not tile[:, 2:].any()

    path = write_picture(tmp_path / "b.png", draw_scene(3, (500, 700)).image)
    path.with_suffix(".pgw").write_text("0.001 0 0 -0.001 10 10")
    panorama = open_panorama(path, read_artifact(model), Tiling(), 10**6)
    whole = panorama.cut(panorama.tiles[0])
    monkeypatch.setattr(tiles, "_MOST_PADDED", 10**6)
    assert np.abs(panorama.cut(panorama.tiles[0]).astype(int) - whole).mean() < 0.5 and whole.any()


@pytest.mark.parametrize("side", [1e306, 1e9])
def test_a_panorama_of_any_extent_is_refused_as_oversized(tmp_path: Path, model: Path, side: float) -> None:
    rasterio = pytest.importorskip("rasterio")
    place = rasterio.Affine(side, 0, 0, 0, -100, 0)
    with rasterio.open(
        tmp_path / "a.tif", "w", "GTiff", 700, 300, 3, "EPSG:3857", dtype="uint8", transform=place
    ) as file:
        file.write(np.full((3, 300, 700), 90, np.uint8))
    with pytest.raises(ImageError, match="oversized"):
        open_panorama(tmp_path / "a.tif", read_artifact(model), Tiling(), 10**9)
