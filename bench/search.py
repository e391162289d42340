"""The exact search of rules, compared with the notebook's nested loops over 140 thresholds x 17 min areas.

The loops would take hours, so their time is extrapolated from a sample: random pairs of threshold and min area, each
post-processed and scored on a random map as in the notebook. The mean time is multiplied by the number of calls in the
loops. The Dice of each sampled pair must equal that of the search.

The time depends on the maps but not on the truth, so the truth is the model's own masks, slightly shifted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloudrt.masks.rle import pack_mask, unpack_mask
from cloudrt.masks.rule import Rule
from cloudrt.search.choose import choose_rules
from cloudrt.search.tables import LabelledMaps, measure
from cloudrt.system.machine import usable_cpus

from .agreement import AgreementError
from .notebook import post_process

THRESHOLDS = tuple(int(255 * (0.30 + 0.005 * step)) for step in range(140))
MIN_AREAS = tuple(range(9000, 25001, 1000))
SAMPLE = 60


@dataclass(frozen=True)
class SearchTime:
    """Times of the search over all images on `threads` threads, and of the loops on one thread.

    Parameters
    ----------
    images, classes, thresholds, min_areas
        Size of the search.
    threads
        Number of threads of the search.
    seconds
        Time for every threshold and min area of the grid.
    all_seconds
        Time for all 256 thresholds with the same min areas.
    choice_seconds
        Time to choose the rules from the tables: smoothing, gates, cross-validation.
    loop_calls, loop_seconds
        Number of maps that the nested loops post-process, and the time that they would take.
    """

    images: int
    classes: int
    thresholds: int
    min_areas: int
    threads: int
    seconds: float
    all_seconds: float
    choice_seconds: float
    loop_calls: int
    loop_seconds: float

    @property
    def ratio(self) -> float:
        """Speed relative to the nested loops."""
        return self.loop_seconds / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return vars(self) | {"ratio": self.ratio}


def label_maps(maps: Sequence[NDArray[np.uint8]], rules: Sequence[Rule]) -> list[LabelledMaps]:
    """Return (C, W, H) maps with a synthetic truth: the mask of each class, shifted by eight pixels."""
    labelled = []
    for levels in maps:
        truth = np.stack(
            [
                pack_mask((np.roll(one, 8, 0) > rule.threshold).view(np.uint8).T)
                for one, rule in zip(levels, rules, strict=True)
            ]
        )
        labelled.append(LabelledMaps(levels, truth))
    return labelled


def measure_search(images: Sequence[LabelledMaps], advance: Callable[[], object], sample: int = SAMPLE) -> SearchTime:
    """Time the search and the loops; `advance` is called after each of four steps.

    Raises
    ------
    AgreementError
        The loops give another Dice than the search for a threshold, a min area and a map.
    """
    threads = usable_cpus()
    measure(images[:1], 1)  # compiles or loads the kernels
    began = time.perf_counter()
    tables = measure(images, len(images), THRESHOLDS, MIN_AREAS, threads)
    seconds = time.perf_counter() - began
    advance()
    began = time.perf_counter()
    measure(images, len(images), range(256), MIN_AREAS, threads)
    all_seconds = time.perf_counter() - began
    advance()
    began = time.perf_counter()
    if len(images) > 1:
        choose_rules(tables)
    choice_seconds = time.perf_counter() - began
    advance()
    classes, count, rows, columns = tables.dice.shape
    draw = np.random.default_rng(0)
    spent = 0.0
    for _ in range(sample):
        c, n, t, a = (int(draw.integers(size)) for size in (classes, count, rows, columns))
        levels = images[n].levels[c]
        truth = unpack_mask(images[n].truth[c], (levels.shape[1], levels.shape[0])).T
        began = time.perf_counter()
        dice = loop_dice(levels, truth, int(tables.thresholds[t]), int(tables.min_areas[a]))
        spent += time.perf_counter() - began
        if abs(dice - tables.dice[c, n, t, a]) > 1e-12:
            raise AgreementError(
                f"the nested loops score threshold {tables.thresholds[t]} with min area {tables.min_areas[a]} as "
                f"{dice}, the search as {tables.dice[c, n, t, a]}: the times cannot be compared"
            )
    advance()
    calls = count * classes * rows * columns
    return SearchTime(
        images=count,
        classes=classes,
        thresholds=rows,
        min_areas=columns,
        threads=threads,
        seconds=seconds,
        all_seconds=all_seconds,
        choice_seconds=choice_seconds,
        loop_calls=calls,
        loop_seconds=spent / sample * calls,
    )


def loop_dice(levels: NDArray[np.uint8], truth: NDArray[np.uint8], threshold: int, min_area: int) -> float:
    """Return the Dice of a post-processed map, computed as in the notebook's inner loop."""
    kept = post_process(levels, threshold, min_area)
    total = kept.sum() + truth.sum()
    return float(2 * (kept * truth).sum() / total) if total else 1.0
