"""Speed of an exported model relative to its fp32 version in the same provider."""

from __future__ import annotations

from time import perf_counter

import numpy as np
import onnx
from numpy.typing import NDArray

from cloudrt.engines.base import Engine
from cloudrt.engines.choice import open_engine

BATCH = 4
ROUNDS = 7


def measure_speed(
    model: onnx.ModelProto, baseline: onnx.ModelProto, provider: str, images: NDArray[np.uint8], rounds: int = ROUNDS
) -> float:
    """Return the speed of `model` relative to `baseline`: the median ratio over alternating batches.

    Parameters
    ----------
    model, baseline
        Finished artifacts with the same input size.
    provider
        Runs both.
    images
        (N, H, W, 3) uint8 RGB. The first ones form a batch, repeated if there are fewer.
    rounds
        Number of timed pairs of batches, after one warm-up pair.
    """
    batch = images[np.arange(BATCH) % len(images)]
    with open_engine(model, provider, BATCH) as ours, open_engine(baseline, provider, BATCH) as theirs:
        _seconds(ours, batch), _seconds(theirs, batch)
        ratios = [_seconds(theirs, batch) / _seconds(ours, batch) for _ in range(rounds)]
    return float(np.median(ratios))


def _seconds(engine: Engine, batch: NDArray[np.uint8]) -> float:
    begin = perf_counter()
    engine.probability(batch)
    return perf_counter() - begin
