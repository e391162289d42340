"""Cost per image, in time and memory, in runs of 100, 1,000 and 10,000 images."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from cloudrt.inference.run import write_submission
from cloudrt.inference.task import InferTask
from cloudrt.system.statistics import memory

from .workload import Workload, repeat_images

COUNTS = (100, 1_000, 10_000)


@dataclass(frozen=True)
class RunCost:
    """Cost of one run.

    Parameters
    ----------
    images
        Number of images.
    seconds, cpu_seconds
        Wall and CPU seconds per image, from file to CSV.
    memory_mb
        Resident memory at the end of the run; None if unknown.
    """

    images: int
    seconds: float
    cpu_seconds: float
    memory_mb: float | None


@dataclass(frozen=True)
class Scaling:
    """Cost of runs of increasing length."""

    runs: list[RunCost]

    @property
    def cost(self) -> float:
        """Cost per image of the longest run relative to the shortest.

        1 is constant cost; below 1, filling and draining the pipeline slow down the short run.
        """
        return self.runs[-1].seconds / self.runs[0].seconds

    @property
    def cpu_cost(self) -> float:
        """The same in CPU seconds, which other processes affect less."""
        return self.runs[-1].cpu_seconds / self.runs[0].cpu_seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "runs": [asdict(run) for run in self.runs],
            "cost_of_the_longest": self.cost,
            "cpu_cost_of_the_longest": self.cpu_cost,
        }


def measure_scaling(work: Workload, advance: Callable[[], object], counts: Sequence[int] = COUNTS) -> Scaling:
    """Write a submission of each length, repeating the images, after a warm-up run of the first length.

    `advance` is called after each image.
    """
    runs = []
    for count in (counts[0], *counts):
        files = repeat_images(work.files, count)
        began, cpu = time.perf_counter(), time.process_time()
        write_submission(
            work.segmenter,
            files,
            InferTask((), work.folder / "scaling.csv"),
            progress=lambda *_: nullcontext(lambda **_: advance()),
        )
        elapsed, busy = time.perf_counter() - began, time.process_time() - cpu
        runs.append(RunCost(count, elapsed / count, busy / count, memory()))
    return Scaling(runs[1:])
