"""The shipped model on real snapshots, in the folder that CLOUDRT_SNAPSHOTS names; skipped without it.

Each snapshot covers one field of view, and its file name states its position and day.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from support.files import read_pairs

import cloudrt
from cloudrt.geo.positions import read_position
from cloudrt.images.image import find_images
from cloudrt.labels import CLASSES
from cloudrt.masks.rle import rle_decode

FOLDER = Path(os.environ.get("CLOUDRT_SNAPSHOTS", ""))
VIEW = (1400, 2100)

pytestmark = pytest.mark.skipif("CLOUDRT_SNAPSHOTS" not in os.environ, reason="CLOUDRT_SNAPSHOTS names no snapshots")


def test_snapshots_in_a_panorama_have_the_masks_of_single_images(tmp_path: Path) -> None:
    """One below the other, with a field of view without data between them, which no component crosses."""
    images = [cv2.imread(str(file.path)) for file in find_images(FOLDER)[:3]]
    assert all(image is not None and image.shape[:2] == VIEW for image in images)
    pieces = []
    (tmp_path / "in").mkdir()
    for number, image in enumerate(images):
        assert image is not None and cv2.imwrite(str(tmp_path / "in" / f"{number}.png"), image)
        pieces += [image, np.zeros_like(image)]
    path = tmp_path / "stitched20071227_-61--40_-35-35.png"
    assert cv2.imwrite(str(path), np.vstack(pieces[:-1]))
    cloudrt.infer(tmp_path / "in", tmp_path / "single.csv", provider="cpu")
    cloudrt.infer(path, tmp_path / "tiles.csv", provider="cpu", tile=True, overlap=0)
    single, tiled = read_pairs(tmp_path / "single.csv"), read_pairs(tmp_path / "tiles.csv")
    for label in CLASSES:
        whole = rle_decode(tiled[f"{path.name}_{label}"], (5 * 350, 525))
        for number in range(3):
            part = whole[700 * number :][:350]
            assert (part == rle_decode(single[f"{number}.png_{label}"])).all()
        assert not whole[350:700].any()


def test_polygons_of_snapshots_lie_within_their_bounds(tmp_path: Path) -> None:
    import shapely
    from shapely.geometry import shape

    files = {file.key: file.path for file in find_images(FOLDER)}
    cloudrt.infer(FOLDER, tmp_path / "a.geojson", provider="cpu")
    features = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert {one["properties"]["image"] for one in features} <= set(files)
    assert len(features) > len(files) / 2
    for one in features:
        position = read_position(files[one["properties"]["image"]], VIEW)
        assert position and position.date and one["properties"]["date"] == position.date.isoformat()
        outline = shape(one["geometry"])
        assert outline.is_valid and shapely.box(*position.bounds(VIEW)).buffer(0.021).contains(outline)
