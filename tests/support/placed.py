"""Panoramas with a position and a bright rectangle at known coordinates, and the model that segments it."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from support.files import read_pairs
from support.tiny import SMALL_GRIDS, tiny_artifact

import cloudrt
from cloudrt.inference.task import RunSummary
from cloudrt.masks.rule import Rule

WEST, SOUTH, EAST, NORTH = -61.0, 10.0, -54.0, 14.0
PIXEL = 0.02
"""Degrees per pixel of the masks: two pixels of the image."""
BOX = (-58.98, 11.3, -56.0, 12.98)
"""West, south, east and north of the bright rectangle."""
RULES = (Rule(253, 20), Rule(127, 20), Rule(127, 20))
"""With these thresholds, the masks end at the edges of the rectangle, although the model blurs them."""
HOLE = (-58.0, 11.8, -57.5, 12.3)
"""A dark rectangle in the bright one."""


def placed_model(folder: Path) -> Path:
    """Write a tiny artifact with a field of view of 180x120 pixels that segments bright pixels."""
    return tiny_artifact(folder / "model.onnx", (120, 180), SMALL_GRIDS, rules=RULES, field_of_view=(120, 180))


def draw(box: tuple[float, ...], value: int, image: NDArray[np.uint8]) -> None:
    """Set a rectangle, given in degrees, of an image to one level."""
    west, south, east, north = box
    rows = slice(round((NORTH - north) * 100), round((NORTH - south) * 100))
    image[rows, round((west - WEST) * 100) : round((east - WEST) * 100)] = value


def write_scene(folder: Path, day: int, *, name: str = "", hole: bool = True) -> Path:
    """Write a panorama of 7x4 degrees: a bright rectangle, a hole in it, and no data (black) at the eastern edge."""
    image = np.full((400, 700, 3), 30, np.uint8)
    draw(BOX, 220, image)
    if hole:
        draw(HOLE, 30, image)
    image[:, 650:] = 0
    folder.mkdir(exist_ok=True)
    path = folder / (name or f"Aqua_{20200100 + day}_-61--54_10-14.png")
    assert cv2.imwrite(str(path), image)
    return path


def write_days(folder: Path, count: int) -> None:
    """Write panoramas of 3.6x2.4 degrees with many bright blobs, one a day."""
    random = np.random.default_rng(0)
    for day in range(1, count + 1):
        noise = cv2.GaussianBlur(random.random((240, 360)).astype(np.float32), (0, 0), 5)
        name = f"Aqua_2020010{day}_0-3.6_0-2.4.png"
        assert cv2.imwrite(str(folder / name), np.where(noise > 0.5, 220, 30).astype(np.uint8))


def days_of(store: Path) -> list[int]:
    """Return the days of the month in a store; each must be complete."""
    import xarray

    with xarray.open_zarr(store, consolidated=True) as data:
        assert data["mask"].sizes["time"] == data.sizes["time"] == len(data["image"].values)
        assert (data["mask"].mean(("lat", "lon", "pattern")) > 0).all()  # NaN where the mask was not written
        return [int(str(day)[8:10]) for day in data["time"].values]


def run(inputs: Path, output: Path, model: Path, **options: object) -> RunSummary:
    """Segment panoramas with ONNX Runtime's CPU provider."""
    return cloudrt.infer(inputs, output, model, provider="cpu", threads=2, **options)  # type: ignore[arg-type]


def reasons(summary: RunSummary) -> dict[str, str]:
    """Return the failed images and their reasons."""
    assert summary.failures
    return read_pairs(summary.failures)
