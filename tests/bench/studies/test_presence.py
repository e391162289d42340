"""The study of calibration against a plain loop over the bins, and its command on a small file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from cloudrt.bench.studies.presence import calibrate, main

from cloudrt.labels import Labels
from cloudrt.search.probabilities import write_probabilities


def test_calibration_is_that_of_a_plain_loop() -> None:
    random = np.random.default_rng(1)
    predicted = np.append(random.random(400), [0.0, 1.0])
    present = random.random(402) < predicted**2
    error, brier = 0.0, 0.0
    for lower in range(10):
        inside = [i for i, p in enumerate(predicted) if lower / 10 <= p and (p < (lower + 1) / 10 or lower == 9)]
        mean = sum(predicted[i] for i in inside) / len(inside)
        share = sum(bool(present[i]) for i in inside) / len(inside)
        error += len(inside) / 402 * abs(mean - share)
    for p, y in zip(predicted, present, strict=True):
        brier += (p - y) ** 2 / 402
    found = calibrate(predicted, present)
    assert found["expected_error"] == pytest.approx(error) and found["brier"] == pytest.approx(brier)
    assert sum(one["images"] for one in found["bins"]) == 402


def test_a_file_of_probabilities(tmp_path: Path) -> None:
    labels = Labels(classes=("Fish", "Sugar"), label_grid=(8, 8), submit_grid=(8, 8))
    rows = ["Image_Label,EncodedPixels"]
    with write_probabilities(tmp_path / "p.npz", labels) as writer:
        for number in range(10):
            levels = np.array([255, 0] if number < 5 else [0, 255], np.uint8)
            writer.add(f"{number}.jpg", np.zeros((2, 8, 8), np.uint8), levels)
            rows += [f"{number}.jpg_Fish,{'1 3' if number < 5 else ''}", f"{number}.jpg_Sugar,1 3"]
    (tmp_path / "truth.csv").write_text("\n".join(rows) + "\n")
    words = [str(tmp_path / "p.npz"), str(tmp_path / "truth.csv"), "-o", str(tmp_path / "out.json")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    classes = json.loads((tmp_path / "out.json").read_text())["classes"]
    assert classes["Fish"]["brier"] == 0 and classes["Fish"]["expected_error"] == 0
    assert classes["Sugar"]["brier"] == 0.5 and classes["Sugar"]["expected_error"] == 0.5
