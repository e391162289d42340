"""The data of another competition, about defects in steel: a data.json is all that it needs."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from cloudrt.cli.explore import explore
from cloudrt.cli.export import export
from cloudrt.cli.infer import infer
from cloudrt.cli.score import score
from cloudrt.cli.train import train
from cloudrt.cli.tune import tune
from cloudrt.errors import DataError
from cloudrt.labels import Labels
from cloudrt.masks.rle import rle_decode, rle_encode
from cloudrt.masks.table import read_table
from cloudrt.model.artifact import read_artifact

GRID = (256, 1600)
STEEL: dict[str, Any] = {
    "classes": ["1", "2", "3", "4"],
    "label_grid": GRID,
    "submit_grid": GRID,
    "key_column": "ImageId_ClassId",
}


def draw_strip(seed: int) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.uint8]]]:
    """A grey strip with defects of a different shape for each class, and their masks."""
    random = np.random.default_rng(seed)
    image = cv2.GaussianBlur(random.integers(60, 140, (*GRID, 1), np.uint8), (0, 0), 3)
    image = np.repeat(image.reshape(*GRID, 1), 3, axis=2)
    masks: dict[str, NDArray[np.uint8]] = {}
    for number, label in enumerate(STEEL["classes"]):
        mask = np.zeros(GRID, np.uint8)
        if random.random() < 0.6:
            x, y = int(random.integers(100, 1500)), int(random.integers(60, 200))
            size = [(40, 40), (150, 25), (15, 55), (90, 55)][number]
            cv2.ellipse(mask, (x, y), size, 0, 0, 360, 1, -1)
            image[mask > 0] = [(250, 250, 250), (10, 10, 10), (250, 250, 250), (0, 0, 0)][number]
        masks[label] = mask
    return np.asarray(image, np.uint8), masks


@pytest.fixture(scope="module")
def steel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("steel")
    (root / "data.json").write_text(json.dumps(STEEL))
    for part, seeds in (("train", range(10)), ("test", range(100, 103))):
        (root / f"{part}_images").mkdir()
        with (root / ("train.csv" if part == "train" else "truth.csv")).open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["ImageId_ClassId", "EncodedPixels"])
            for seed in seeds:
                image, masks = draw_strip(seed)
                cv2.imwrite(str(root / f"{part}_images" / f"{seed:04}.jpg"), image)
                rows.writerows([f"{seed:04}.jpg_{label}", rle_encode(mask)] for label, mask in masks.items())
    return root


def run(command, *words: object) -> str:  # type: ignore[no-untyped-def]
    done = CliRunner().invoke(command, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


def test_steel_trains_exports_runs_and_scores(steel: Path, tmp_path: Path) -> None:
    page = tmp_path / "explore.html"
    assert "10 images" in run(explore, steel, "-o", page) and page.exists()
    settings = [
        *("--encoder", "resnet18", "--encoder-weights", "none", "--input-size", "416x64", "--augment", "flips"),
        *("--batch-size", 4, "--accumulate", 1, "--schedule", "one-cycle", "--encoder-lr", 3e-3, "--decoder-lr", 3e-3),
        *("--set", "decoder_pyramid_channels=32", "--set", "decoder_segmentation_channels=32"),
    ]
    run(train, steel, "--runs", tmp_path, "--name", "run", "--cache", tmp_path / "cache", "--epochs", 3, *settings)
    model = tmp_path / "run" / "model.onnx"
    run(export, tmp_path / "run" / "best.pth", "--data", steel / "train_images", "--max-images", 4)
    labels = Labels(tuple(STEEL["classes"]), GRID, GRID, "ImageId_ClassId")
    assert read_artifact(model).labels == labels
    assert [d.dim_value for d in onnx.load(model).graph.output[0].type.tensor_type.shape.dim][1:] == [4, 1600, 256]
    output = tmp_path / "submission.csv"
    run(infer, steel / "test_images", "--model", model, "--provider", "cpu", "-o", output)
    assert output.read_text().splitlines()[0] == "ImageId_ClassId,EncodedPixels"
    result = json.loads(run(score, output, steel / "truth.csv", "--data", steel, "--json"))
    ours, truth = (read_table(path, labels) for path in (output, steel / "truth.csv"))
    dices = []
    for key, text in truth.items():
        one, other = rle_decode(ours[key], GRID).astype(bool), rle_decode(text, GRID).astype(bool)
        dices.append(2 * (one & other).sum() / (one.sum() + other.sum()) if one.any() or other.any() else 1.0)
    assert result["mean"] == pytest.approx(np.mean(dices))
    search = ["--provider", "cpu", "--thresholds", "60:200:20", "--min-areas", "0,200,1000"]
    run(tune, model, steel, "-o", tmp_path / "tuned.onnx", *search)
    assert read_artifact(tmp_path / "tuned.onnx").labels == labels


def test_a_table_with_another_key_column_is_refused_by_its_header(steel: Path) -> None:
    with pytest.raises(DataError, match="header is 'ImageId_ClassId,EncodedPixels', expected 'Image_Label"):
        read_table(steel / "truth.csv")
