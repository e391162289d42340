"""Masks from ONNX Runtime, OpenCV and NumPy alone, as a reference for the pipeline; and images for them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import onnxruntime
from numpy.typing import NDArray
from support.tiny import SMALL_GRIDS

from cloudrt.masks.rule import Rule

SIZE = (64, 96)
"""Height and width of the images that `tiny_artifact` takes by default."""


def picture(value: int, top: int = 10) -> NDArray[np.uint8]:
    """An image of one level with `top` black rows, so that no class covers all of it."""
    image = np.full((*SIZE, 3), value, np.uint8)
    image[:top] = 0
    return image


def pictures(count: int) -> list[NDArray[np.uint8]]:
    """Return `count` bright images, 50 at most, whose masks all differ, so that a test notices a changed order."""
    return [picture(201, 2 + number) for number in range(count)]


def plain_answers(model: Path, image: NDArray[np.uint8], rules: tuple[Rule, ...]) -> dict[str, str]:
    """Class -> RLE of one image, from ONNX Runtime at batch 1, OpenCV's components and NumPy's run lengths."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    levels = session.run(["probability"], {"image": image[None]})[0][0]
    texts = {}
    for label, level, rule in zip(SMALL_GRIDS.classes, levels, rules, strict=True):
        _, components = cv2.connectedComponents((rule.threshold < level.T).astype(np.uint8), connectivity=8)
        areas = np.bincount(components.ravel())
        kept = (areas > rule.min_area) & (np.arange(len(areas)) > 0)
        flat = np.concatenate([[0], kept[components].T.ravel(), [0]]).astype(int)
        starts, stops = np.flatnonzero(np.diff(flat) == 1), np.flatnonzero(np.diff(flat) == -1)
        texts[label] = " ".join(f"{a + 1} {b - a}" for a, b in zip(starts, stops, strict=True))
    return texts
