"""Whether an image costs the same in a run of 100, 1,000 and 10,000, in time and in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from cloudrt.images.image import ImageFile
from cloudrt.inference.pipeline import Segmenter
from cloudrt.inference.submission import open_submission
from cloudrt.system.statistics import memory

COUNTS = (100, 1_000, 10_000)


@dataclass(frozen=True)
class Run:
    """A run: its images; seconds and processor seconds per image from file to CSV; megabytes resident at its end.

    `memory_mb` is None where the system does not say.
    """

    images: int
    seconds: float
    cpu_seconds: float
    memory_mb: float | None


@dataclass(frozen=True)
class Scaling:
    """All runs; `cost` is what an image costs in the longest one, in times of the shortest."""

    runs: list[Run]

    @property
    def cost(self) -> float:
        """1 is flat; below it, filling and draining the pipeline weigh on the short run."""
        return self.runs[-1].seconds / self.runs[0].seconds

    @property
    def cpu_cost(self) -> float:
        """The same in processor seconds, which others on the machine disturb less."""
        return self.runs[-1].cpu_seconds / self.runs[0].cpu_seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "runs": [vars(run) for run in self.runs],
            "cost_of_the_longest": self.cost,
            "cpu_cost_of_the_longest": self.cpu_cost,
        }


def measure_scaling(
    segmenter: Segmenter,
    files: Sequence[ImageFile],
    folder: Path,
    advance: Callable[[], object],
    counts: Sequence[int] = COUNTS,
) -> Scaling:
    """Write a submission of each length, the images repeated as often as it takes; a run of the first does not count.

    `advance` is called after each image.
    """
    runs = []
    for count in (counts[0], *counts):
        began, cpu = time.perf_counter(), time.process_time()
        with open_submission(folder / "scaling.csv", segmenter.labels) as submission:
            for result in segmenter.predict(_repeated(files, count)):
                submission.add(result.image, result.rle, result.error)
                advance()
        elapsed, busy = time.perf_counter() - began, time.process_time() - cpu
        runs.append(Run(count, elapsed / count, busy / count, memory()))
    return Scaling(runs[1:])


def _repeated(files: Sequence[ImageFile], count: int) -> Iterator[ImageFile]:
    """Yield the files again and again, each time under another key."""
    for number, file in enumerate(islice(cycle(files), count)):
        yield ImageFile(f"{number}-{file.key}", file.path)
