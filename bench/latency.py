"""Latency of a single image, at batch size 1 and without overlap."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cloudrt.inference.pipeline import Segmenter

from .workload import Workload

REQUESTS = 60
WARM_UP = 3
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Latency:
    """Percentiles, in milliseconds, from file to RLE text in a warm process."""

    requests: int
    percentiles: dict[int, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {f"p{percent}": milliseconds for percent, milliseconds in self.percentiles.items()}
        return {"requests": self.requests, "milliseconds": values}


def measure_latency(work: Workload, advance: Callable[[], object]) -> Latency:
    """Segment one image after another at batch size 1; `advance` is called after each of `REQUESTS`."""
    taken = []
    ours = work.segmenter
    options = ours.options.changed(provider=ours.plan.provider, batch_size=1, threads=ours.threads)
    with Segmenter(ours.model, options) as segmenter:
        for number in range(-WARM_UP, REQUESTS):
            file = work.files[number % len(work.files)]
            began = time.perf_counter()
            list(segmenter.predict([file]))
            if number >= 0:
                taken.append(1000 * (time.perf_counter() - began))
                advance()
    values = np.percentile(taken, PERCENTILES)
    return Latency(REQUESTS, dict(zip(PERCENTILES, values.tolist(), strict=True)))
