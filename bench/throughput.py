"""The engine's rate against the size of its batches and against its threads, until it saturates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cloudrt.engines.choice import open_engine
from cloudrt.errors import MemoryExhausted
from cloudrt.images.image import Image
from cloudrt.inference.pipeline import Segmenter
from cloudrt.model.artifact import load_model

GAIN = 1.03
"""A step that brings less than this, twice in a row, is the end."""
BLOCK = 0.15
"""Seconds that a point's block takes at least."""
TURNS = 3
LARGEST = 256


@dataclass(frozen=True)
class Point:
    """A rate in images per second, with its spread over the turns, at a batch size and a number of threads."""

    batch_size: int
    threads: int
    images_per_second: float
    iqr: float


def measure_throughput(
    segmenter: Segmenter, images: Sequence[Image], advance: Callable[[], object]
) -> dict[str, list[Point]]:
    """Return the points of both curves: "batch size" with all threads, "threads" at the batch size of the run.

    Parameters
    ----------
    segmenter
        Whose provider and artifact are measured; one stream, whatever its plan has.
    images
        Of the input size; repeated as often as a batch needs.
    advance
        Called after each point.
    """
    sizes = [2**step for step in range(LARGEST.bit_length())]
    threads = sorted({*(2**step for step in range(segmenter.threads.bit_length())), segmenter.threads})
    on_gpu = segmenter.plan.provider in ("cuda", "tensorrt")
    curves = {"batch size": _climb(segmenter, images, ((size, segmenter.threads) for size in sizes), advance)}
    if not on_gpu and len(threads) > 1:
        steps = ((segmenter.batch_size, count) for count in threads if count <= segmenter.threads)
        curves["threads"] = _climb(segmenter, images, steps, advance)
    return curves


def _climb(
    segmenter: Segmenter, images: Sequence[Image], steps: Iterable[tuple[int, int]], advance: Callable[[], object]
) -> list[Point]:
    points: list[Point] = []
    idle = 0
    for size, threads in steps:
        try:
            points.append(_measure(segmenter, images, size, threads))
        except MemoryExhausted:
            break
        advance()
        best = max((point.images_per_second for point in points[:-1]), default=0.0)
        idle = 0 if points[-1].images_per_second > GAIN * best else idle + 1
        if idle == 2:
            break
    return points


def _measure(segmenter: Segmenter, images: Sequence[Image], size: int, threads: int) -> Point:
    batch = np.stack([images[number % len(images)] for number in range(size)])
    with open_engine(load_model(segmenter.model), segmenter.plan.provider, size, threads) as engine:

        def block(times: int) -> float:
            began = time.perf_counter()
            for _ in range(times):
                engine.run(batch)
            return (time.perf_counter() - began) / times

        times = max(1, round(BLOCK / min(block(1), block(1))))
        rates = [size / block(times) for _ in range(TURNS)]
    low, median, high = np.percentile(rates, (25, 50, 75))
    return Point(size, threads, float(median), float(high - low))
