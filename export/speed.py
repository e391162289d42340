"""How fast an exported model is beside its own fp32 form, in the same provider, in turns."""

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
    """Return how many times as fast as `baseline` a model runs: the median of ratios of batches that take turns.

    Parameters
    ----------
    model, baseline
        Finished artifacts of one input size.
    provider
        Runs both.
    images
        (N, H, W, 3) uint8 RGB; a batch is made of the first few, repeated where there are fewer.
    rounds
        Pairs of batches that are timed, after one of each that is not.
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
