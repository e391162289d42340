"""Time two ways to do the same work: interleaved, warmed up, median and spread.

    warm-up: ours, theirs      then, `repeat` times: ours, theirs, ours, theirs, ...

Interleaving lets a slow spell of the machine fall on both. A pass works through all images, and its seconds are divided
by their number, so that figures are per image whatever a way does at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

REST = 0.02
"""Seconds between two passes: thread pools spin for a while after their work, and would slow the other way."""

NOISY = 0.25
"""A spread, as a share of the median, past which a figure is called noisy."""


@dataclass(frozen=True)
class Stage:
    """One stage, done in two ways; each call works through all images once. Nothing that they set up is timed."""

    name: str
    ours: Callable[[], object]
    notebook: Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds per image of each repetition."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median, in seconds per image."""
        return float(np.median(self.seconds))

    @property
    def iqr(self) -> float:
        """The interquartile range, in seconds per image."""
        low, high = np.percentile(self.seconds, (25, 75))
        return float(high - low)

    @property
    def noisy(self) -> bool:
        """Whether the repetitions are so far apart that something else must have used the machine."""
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
    """The time of one stage, and of the notebook's."""

    name: str
    ours: Timing
    notebook: Timing

    @property
    def ratio(self) -> float:
        """How many times as fast ours is: median over median."""
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
    """Time each stage `repeat` times, after one pass of each way that does not count.

    Parameters
    ----------
    stages
        What to time.
    images
        How many images one pass works through.
    repeat
        Passes of each way that count.
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
    """Return how many passes `measure` makes."""
    return 2 * (repeat + 1) * len(stages)
