"""Panoramas that are larger than the field of view, and a model for them whose rules use gates and presence."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from support.tiny import SMALL_GRIDS, tiny_artifact

from cloudrt.masks.rule import Rule

VIEW = (120, 180)
"""Height and width of the field of view in pixels."""
INPUT = (64, 96)
RULES = (Rule(127, 40), Rule(110, 5, gate_threshold=140, gate_pixels=900), Rule(90, 0, presence=100))


def tiled_model(folder: Path) -> Path:
    """Write a tiny artifact with a field of view of 180x120 pixels and a presence output."""
    return tiny_artifact(folder / "model.onnx", INPUT, SMALL_GRIDS, presence=True, rules=RULES, field_of_view=VIEW)


def write_picture(path: Path, image: NDArray[np.uint8]) -> Path:
    """Write an (H, W, 3) RGB image, and return its path."""
    assert cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return path
