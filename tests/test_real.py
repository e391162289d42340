"""The shipped model on real images, where there are any: CLOUDRT_DATA names a folder in the competition's layout.

It holds test_images/ and test_truth.csv, images that the model was not trained on.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cloudrt.data import read_table
from cloudrt.images import ImageFile
from cloudrt.metric import score
from cloudrt.pipeline import Segmenter
from cloudrt.submission import open_submission

DATA = Path(os.environ.get("CLOUDRT_DATA", ""))


@pytest.mark.skipif("CLOUDRT_DATA" not in os.environ, reason="CLOUDRT_DATA names no real data")
def test_shipped_model_beats_predicting_nothing(tmp_path: Path) -> None:
    rows = read_table(DATA / "test_truth.csv")
    names = list(dict.fromkeys(name for name, _ in rows))[:150]
    truth = tmp_path / "truth.csv"
    lines = [f"{name}_{label},{text}" for (name, label), text in rows.items() if name in set(names)]
    truth.write_text("Image_Label,EncodedPixels\n" + "\n".join(lines) + "\n")
    with Segmenter(provider="cpu") as segmenter, open_submission(tmp_path / "submission.csv") as submission:
        for result in segmenter.predict(ImageFile(name, DATA / "test_images" / name) for name in names):
            submission.add(result.image, result.rle, result.error)
    found = score(tmp_path / "submission.csv", truth)
    assert submission.failed == 0
    assert found.mean > found.all_empty + 0.05


def test_shipped_model_is_small_and_says_where_it_comes_from() -> None:
    from importlib.resources import files

    from cloudrt.artifact import read_artifact

    path = Path(str(files("cloudrt"))) / "models" / "clouds.onnx"
    assert path.stat().st_size < 16e6
    said = read_artifact(path)
    assert said.precision == "fp16"
    assert said.parity["dice"] >= 0.995
    assert said.parity["empty_mismatch"] <= 0.005
    assert "NASA Worldview" in said.weights_license
