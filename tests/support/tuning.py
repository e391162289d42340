"""A model and scenes to tune its rules on, and `cloudrt tune` with them."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
from click.testing import Result
from support import reference
from support.commands import invoke
from support.tiny import SMALL_GRIDS, tiny_artifact, write_jpeg

from cloudrt.cli.tune import tune
from cloudrt.inference.pipeline import Segmenter
from cloudrt.masks.postprocess import apply_rules
from cloudrt.masks.rle import rle_decode
from cloudrt.masks.rule import Rule

SIZE = (64, 96)
IMAGES = 9
GOOD = (Rule(150, 40), Rule(90, 100), Rule(120, 5))


def untuned_model(folder: Path) -> Path:
    """Write an artifact whose rules are poor."""
    return tiny_artifact(folder / "model.onnx", SIZE, SMALL_GRIDS, rules=(Rule(10, 0),) * 3)


def write_scenes(root: Path, model: Path) -> None:
    """Write scenes whose truth is the model's mask with `GOOD`, eroded by one pixel; every third image has no Fish."""
    (root / "data.json").write_text(json.dumps(SMALL_GRIDS.to_dict()))
    files = [write_jpeg(root / "train_images" / f"{seed}.jpg", seed, (120, 180)) for seed in range(IMAGES)]
    rows = ["Image_Label,EncodedPixels"]
    with Segmenter(model, provider="cpu") as segmenter:
        for n, inferred in enumerate(segmenter.infer(files)):
            assert inferred.probability is not None
            for label, text in zip(SMALL_GRIDS.classes, apply_rules(inferred.probability, GOOD), strict=True):
                mask = cv2.erode(np.ascontiguousarray(rle_decode(text, (60, 90))), np.ones((3, 3), np.uint8))
                mask *= not (label == "Fish" and n % 3 == 0)
                large = mask.repeat(2, axis=0).repeat(2, axis=1)
                rows.append(f"{inferred.image}_{label},{reference.rle_encode(large)}")
    (root / "train.csv").write_text("\n".join(rows) + "\n")


def run(*words: str | Path, status: int = 0) -> Result:
    """Run `cloudrt tune`, and check its exit status."""
    return invoke(tune, *words, status=status)
