"""Time two implementations of the same work alternately, after a warm-up, with median and spread.

    warm-up: ours, theirs      then `repeat` times: ours, theirs

Because they alternate, slow periods of the machine affect both. A pass processes all images, and its time is divided by
their number, so figures are per image, whatever the batch size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

REST = 0.02
"""Seconds between two passes: thread pools spin for a while after their work, which would slow the next pass."""

NOISY = 0.25
"""Interquartile range, as a share of the median, above which a figure is marked as noisy."""


@dataclass(frozen=True)
class Stage:
    """A stage in two implementations; each call processes all images once, without set-up."""

    name: str
    ours: Callable[[], object]
    notebook: Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds per image of each repetition."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median, in seconds per image."""
        return float(np.median(self.seconds))

    @property
    def iqr(self) -> float:
        """Interquartile range, in seconds per image."""
        low, high = np.percentile(self.seconds, (25, 75))
        return float(high - low)

    @property
    def noisy(self) -> bool:
        """Whether the repetitions differ so much that the machine probably had other load."""
        return self.iqr > NOISY * self.median

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; seconds are per image."""
        return {
            "median_s": self.median,
            "iqr_s": self.iqr,
            "images_per_second": 1 / self.median,
            "repetitions_s": list(self.seconds),
        }


@dataclass(frozen=True)
class StageTime:
    """Times of a stage."""

    name: str
    ours: Timing
    notebook: Timing

    @property
    def ratio(self) -> float:
        """Speed relative to the notebook's way: median over median."""
        return self.notebook.median / self.ours.median

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "name": self.name,
            "ours": self.ours.to_dict(),
            "notebook": self.notebook.to_dict(),
            "ratio": self.ratio,
        }


def measure(stages: Sequence[Stage], images: int, repeat: int, advance: Callable[[], object]) -> list[StageTime]:
    """Time each stage `repeat` times, after one warm-up pass of each way.

    Parameters
    ----------
    stages
        What to time.
    images
        Number of images that one pass processes.
    repeat
        Number of timed passes of each way.
    advance
        Called after each of the `passes(stages, repeat)` passes.
    """
    measured = []
    for stage in stages:
        ours: list[float] = []
        notebook: list[float] = []
        for _ in range(repeat + 1):
            for way, seconds in ((stage.ours, ours), (stage.notebook, notebook)):
                time.sleep(REST)
                began = time.perf_counter()
                way()
                seconds.append((time.perf_counter() - began) / images)
                advance()
        measured.append(StageTime(stage.name, Timing(tuple(ours[1:])), Timing(tuple(notebook[1:]))))
    return measured


def passes(stages: Sequence[Stage], repeat: int) -> int:
    """Return the number of passes that `measure` makes."""
    return 2 * (repeat + 1) * len(stages)
