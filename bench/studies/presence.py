"""Calibration of the presence output: predicted probability that a class is in an image, and observed share.

    python -m cloudrt.bench.studies.presence PROBABILITIES TRUTH -o FILE.json

PROBABILITIES is from `cloudrt-infer --save-probabilities` with a model that has the output, and TRUTH has the rows of
the same images. The expected calibration error is that of Guo et al. (2017, arXiv:1706.04599), with ten bins of equal
width: the mean of |mean prediction - observed share| over the bins, weighted by their number of images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import DataError
from cloudrt.masks.table import read_table
from cloudrt.search.probabilities import Probabilities

from .results import save

BINS = 10


def calibrate(predicted: NDArray[np.float64], present: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the Brier score, the expected calibration error and the bins of (N,) predictions in 0..1."""
    number = np.minimum((predicted * BINS).astype(int), BINS - 1)
    bins, error = [], 0.0
    for index in range(BINS):
        some = number == index
        if some.any():
            mean, share = float(predicted[some].mean()), float(present[some].mean())
            bins.append({"images": int(some.sum()), "predicted": mean, "observed": share})
            error += some.mean() * abs(mean - share)
    return {"brier": float(((predicted - present) ** 2).mean()), "expected_error": float(error), "bins": bins}


@click.command()
@click.argument("probabilities", type=click.Path(path_type=Path, exists=True))
@click.argument("truth", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(probabilities: Path, truth: Path, output: Path | None) -> None:
    """Measure the calibration of the presence output."""
    with Probabilities(probabilities) as kept:
        rows = read_table(truth, kept.labels)
        levels = []
        for key in kept.keys:
            presence = kept.read(key)[1]
            if presence is None:
                raise DataError(f"{probabilities} has no presence output")
            levels.append(presence)
        predicted = np.array(levels) / 255
        classes = {
            label: calibrate(predicted[:, index], np.array([bool(rows[key, label]) for key in kept.keys]))
            for index, label in enumerate(kept.labels.classes)
        }
    save({"images": len(levels), "classes": classes}, output)


if __name__ == "__main__":
    main()
