"""How long one image takes that comes alone: no batch is filled, nothing overlaps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cloudrt.images.image import ImageFile
from cloudrt.inference.pipeline import Segmenter

REQUESTS = 60
SHARES = (50, 95, 99)


@dataclass(frozen=True)
class Latency:
    """Percentiles, in milliseconds, from file to RLE text, in a process that is warm."""

    requests: int
    percentiles: dict[int, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {f"p{share}": milliseconds for share, milliseconds in self.percentiles.items()}
        return {"requests": self.requests, "milliseconds": values}


def measure_latency(
    model: Path, provider: str, threads: int, files: Sequence[ImageFile], advance: Callable[[], object]
) -> Latency:
    """Ask for one image after another at batch 1; `advance` is called after each of `REQUESTS`."""
    taken = []
    with Segmenter(model, provider=provider, batch_size=1, threads=threads) as segmenter:
        for number in range(REQUESTS + 3):  # the first ones warm up
            file = files[number % len(files)]
            began = time.perf_counter()
            list(segmenter.predict([file]))
            taken.append(1000 * (time.perf_counter() - began))
            if number >= 3:
                advance()
    values = np.percentile(taken[3:], SHARES)
    return Latency(REQUESTS, {share: float(value) for share, value in zip(SHARES, values, strict=True)})
