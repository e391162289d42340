"""Synthetic panoramas: scenes side by side, with their masks, and a name that states their position."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from support.files import read_pairs

from cloudrt.cli import main
from cloudrt.data.panorama import write_panoramas
from cloudrt.data.scenes import draw_scene
from cloudrt.errors import DataError
from cloudrt.geo.positions import read_position
from cloudrt.labels import CLASSES, LABEL_GRID
from cloudrt.masks.rle import rle_decode


def test_panoramas_are_scenes_side_by_side(tmp_path: Path) -> None:
    words = ["synth", str(tmp_path / "out"), "--panorama", "440x140", "--days", "2", "--size", "208x140", "--seed", "3"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    again = write_panoramas(tmp_path / "again", (140, 440), 2, 3, scene=(140, 208), threads=1)
    names = ["synthetic_20200101_-2.2-2.2_-0.7-0.7.jpg", "synthetic_20200102_-2.2-2.2_-0.7-0.7.jpg"]
    assert [path.name for path in again] == names
    texts = read_pairs(tmp_path / "out" / "truth.csv")
    assert list(texts) == [f"{name}_{label}" for name in names for label in CLASSES]
    seeds = np.random.SeedSequence(3).spawn(6)
    for day, path in enumerate(again):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
        image = cv2.imread(str(path))
        assert image is not None and image.shape == (140, 440, 3)
        position = read_position(path, (140, 440))
        assert position and position.date and position.date.day == day + 1
        assert position.bounds((140, 440)) == pytest.approx((-2.2, -0.7, 2.2, 0.7))
        scene = draw_scene(seeds[3 * day + 1], (140, 208))
        assert np.abs(image[:, 208:416, ::-1].astype(int) - scene.image).mean() < 6
        for label, mask in zip(CLASSES, scene.masks, strict=True):
            found = rle_decode(texts[f"{path.name}_{label}"], (35, 110))[:, 52:104]
            share = cv2.resize(mask, (52, 35), interpolation=cv2.INTER_AREA).mean()
            assert abs(found.mean() - share) < 0.03 and mask.shape == LABEL_GRID


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((140, 442), "multiples of 4"),
        ((100, 440), "at least 208x140 pixels"),
        ((440, 140), "at least 208x140 pixels"),
        ((140, 40_000), "at most 36000x18000"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path: Path, size: tuple[int, int], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        write_panoramas(tmp_path / "out", size, scene=(140, 208))
    assert not (tmp_path / "out").exists()
