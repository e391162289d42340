"""The shipped model; and its results on real images, if CLOUDRT_DATA names a folder of them.

The folder contains test_images/, which the model was not trained on, and test_truth.csv.
"""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from support import reference

from cloudrt.images.image import ImageFile
from cloudrt.inference.pipeline import Segmenter
from cloudrt.inference.submission import open_submission
from cloudrt.masks.metric import score
from cloudrt.masks.postprocess import postprocess
from cloudrt.masks.table import read_table
from cloudrt.model.artifact import read_artifact

DATA = Path(os.environ.get("CLOUDRT_DATA", ""))
needs_data = pytest.mark.skipif("CLOUDRT_DATA" not in os.environ, reason="CLOUDRT_DATA is not set")


@needs_data
def test_shipped_model_beats_predicting_nothing(tmp_path: Path) -> None:
    rows = read_table(DATA / "test_truth.csv")
    names = list(dict.fromkeys(name for name, _ in rows))[:150]
    truth = tmp_path / "truth.csv"
    lines = [f"{name}_{label},{text}" for (name, label), text in rows.items() if name in set(names)]
    truth.write_text("Image_Label,EncodedPixels\n" + "\n".join(lines) + "\n")
    with Segmenter(provider="cpu") as segmenter, open_submission(tmp_path / "s.csv", segmenter.labels) as submission:
        for result in segmenter.predict(ImageFile(name, DATA / "test_images" / name) for name in names):
            submission.add(result.image, result.rle, result.error)
    found = score(tmp_path / "s.csv", truth)
    assert submission.failed == 0
    assert found.mean > found.all_empty + 0.05


def test_shipped_model_is_small_and_states_its_source() -> None:
    path = Path(str(files("cloudrt.model"))) / "shipped" / "clouds.onnx"
    assert path.stat().st_size < 16e6
    said = read_artifact(path)
    assert said.precision == "fp16"
    assert said.parity["dice"] >= 0.995
    assert said.parity["empty_mismatch"] <= 0.005
    assert "Apache-2.0" in said.weights_license
    assert "NASA Worldview" in path.with_name("README.md").read_text(encoding="utf-8")


@needs_data
def test_real_probabilities_give_the_text_of_the_reference() -> None:
    names = sorted(path.name for path in (DATA / "test_images").iterdir())[:20]
    with Segmenter(provider="cpu") as segmenter:
        for inferred in segmenter.infer(ImageFile(name, DATA / "test_images" / name) for name in names):
            assert inferred.probability is not None
            for levels in inferred.probability:
                for threshold, min_area in ((30, 0), (90, 500), (128, 5000), (160, 20_000)):
                    expected = reference.postprocess(levels.T, threshold, min_area)
                    assert postprocess(levels.T, threshold, min_area) == expected
                    assert postprocess(levels.T / np.float32(255), (threshold + 0.5) / 255, min_area) == expected
