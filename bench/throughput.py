"""Rate of the engine for increasing batch sizes and numbers of threads, until it saturates."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cloudrt.engines.choice import open_engine
from cloudrt.errors import MemoryExhausted
from cloudrt.model.onnx_file import load_model
from cloudrt.system.progress import Advance, ProgressBar

from .workload import Workload

GAIN = 1.03
"""A curve ends after two steps in a row whose rate is below this multiple of the best rate before."""
BLOCK = 0.15
"""Approximate seconds per timed block of a point."""
TURNS = 3
LARGEST = 256


@dataclass(frozen=True)
class Point:
    """Images per second, with the interquartile range over the turns, for a batch size and a number of threads."""

    batch_size: int
    threads: int
    images_per_second: float
    iqr: float


def measure_throughput(work: Workload, progress: ProgressBar) -> dict[str, list[Point]]:
    """Return two curves: "batch size" with all threads, and "threads" at the batch size of the run.

    Parameters
    ----------
    work
        The model, in its provider with a single stream, and the images, repeated to fill a batch.
    progress
        Opens a progress bar.
    """
    segmenter = work.segmenter
    sizes = [2**step for step in range(LARGEST.bit_length())]
    threads = sorted({*(2**step for step in range(segmenter.threads.bit_length())), segmenter.threads})
    steps = {"batch size": [(size, segmenter.threads) for size in sizes]}
    if not work.on_gpu and len(threads) > 1:
        steps["threads"] = [(segmenter.batch_size, count) for count in threads]
    with progress("Measuring throughput", sum(map(len, steps.values()))) as advance:
        return {name: _climb(work, some, advance) for name, some in steps.items()}


def _climb(work: Workload, steps: Sequence[tuple[int, int]], advance: Advance) -> list[Point]:
    points: list[Point] = []
    idle = 0
    for size, threads in steps:
        try:
            points.append(_measure(work, size, threads))
        except MemoryExhausted:
            break
        advance()
        best = max((point.images_per_second for point in points[:-1]), default=0.0)
        idle = 0 if points[-1].images_per_second > GAIN * best else idle + 1
        if idle == 2:
            break
    if len(points) < len(steps):
        advance(len(steps) - len(points))
    return points


def _measure(work: Workload, size: int, threads: int) -> Point:
    batch = np.stack([work.loaded[number % len(work.loaded)] for number in range(size)])
    with open_engine(load_model(work.segmenter.model), work.segmenter.plan.provider, size, threads) as engine:

        def block(times: int) -> float:
            began = time.perf_counter()
            for _ in range(times):
                engine.run(batch)
            return (time.perf_counter() - began) / times

        times = max(1, round(BLOCK / min(block(1), block(1))))
        rates = [size / block(times) for _ in range(TURNS)]
    low, median, high = np.percentile(rates, (25, 50, 75))
    return Point(size, threads, float(median), float(high - low))
