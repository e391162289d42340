"""Exact search of rules on a validation set: the Dice of every threshold and min area for each image and class.

    levels, truth --one pass per map (kernels/sweep.py)--> pixels and true pixels kept, (T, A) --> DiceTables --> rules

Trying 256 thresholds and 28 min areas separately would threshold, label and filter each map 7,168 times. One pass
over the map (`sweep`) computes all 7,168 results with the same integer counts, from which Dice is computed in float64.
`search_rules` returns the best rule on these images; `choose.py` chooses one that generalises to other images.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import DataError
from cloudrt.kernels.sweep import PIXEL, sweep
from cloudrt.labels import SUBMIT_GRID, Grid
from cloudrt.masks.postprocess import MAX_PIXELS
from cloudrt.masks.rle import unpack_mask
from cloudrt.masks.rule import Rule
from cloudrt.system.machine import usable_cpus
from cloudrt.system.overlap import overlap

THRESHOLDS = tuple(range(256))
MIN_AREAS = (0, 500, 1000, 2500, 5000, 7500, *range(9000, 25001, 1000), 27500, 30000, 35000, 40000, 50000)
"""Min areas in pixels of the 525x350 grid; those from 9,000 to 25,000 are tried by the Kaggle notebook too."""

_LOSSES = -np.log((np.arange(256) + 0.5) / 256)
"""Level -> cross-entropy of a pixel of the class; reversed, that of a pixel outside it."""


def min_areas_for(grid: Grid) -> tuple[int, ...]:
    """Return `MIN_AREAS` scaled to a submission grid, so that they are the same fractions of its pixels."""
    share = grid[0] * grid[1] / (SUBMIT_GRID[0] * SUBMIT_GRID[1])
    return tuple(dict.fromkeys(round(area * share) for area in MIN_AREAS))


@dataclass(frozen=True)
class LabelledMaps:
    """The network's output and the true masks of one image.

    Parameters
    ----------
    levels
        (C, W, H) uint8: the artifact's `probability` output.
    truth
        (C, ceil(W * H / 8)) uint8: masks packed by `pack_mask`.
    presence
        (C,) uint8: the artifact's `presence` output, if it has one.
    """

    levels: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    presence: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class DiceTables:
    """The Dice of every rule on every image of a validation set.

    Parameters
    ----------
    pixels
        Number of pixels of a map, W * H.
    thresholds, min_areas
        (T,) and (A,), ascending.
    dice
        (C, N, T, A) float64: Dice of class c on image n with threshold t and min area a.
    true_pixels
        (C, N) int64: area of the true mask.
    above
        (C, N, 256) int64: number of pixels above each level 0..255, for gates.
    loss
        (C, N) float64: mean binary cross-entropy of the pixels, in nats, where a level v is the probability
        (v + 0.5) / 256. It is highest for the images whose label and prediction differ most.
    presence
        (C, N) uint8, or None if the network has no such output.
    """

    pixels: int
    thresholds: NDArray[np.int64]
    min_areas: NDArray[np.int64]
    dice: NDArray[np.float64]
    true_pixels: NDArray[np.int64]
    above: NDArray[np.int64]
    loss: NDArray[np.float64]
    presence: NDArray[np.uint8] | None

    def of_rule(self, label: int, rule: Rule) -> NDArray[np.float64]:
        """Return the Dice of each image, (N,), with a rule for class number `label`, including gate and presence.

        Raises
        ------
        DataError
            The threshold or min area of the rule is not in the tables.
        """
        if rule.threshold not in self.thresholds or rule.min_area not in self.min_areas:
            raise DataError(f"threshold {rule.threshold} with min area {rule.min_area} was not searched")
        t, a = np.searchsorted(self.thresholds, rule.threshold), np.searchsorted(self.min_areas, rule.min_area)
        return np.where(self.shown(label, rule), self.dice[label, :, t, a], self.true_pixels[label] == 0)

    def shown(self, label: int, rule: Rule) -> NDArray[np.bool_]:
        """Return whether the gate and presence of a rule keep the class on each image, (N,) bool."""
        shown: NDArray[np.bool_] = self.above[label, :, rule.gate_threshold] >= rule.gate_pixels
        if self.presence is not None:
            shown &= self.presence[label] >= rule.presence
        return shown


@dataclass(frozen=True)
class BestRule:
    """The best rule of a class and its mean Dice on the validation set."""

    rule: Rule
    dice: float


class Sweeper:
    """Runs `sweep` on maps of one size, in work space that is reused; one instance per thread.

    Parameters
    ----------
    width, height
        Size of the maps.
    thresholds, min_areas
        (T,) and (A,) int64, ascending.

    Raises
    ------
    DataError
        Maps with too many pixels.
    """

    def __init__(self, width: int, height: int, thresholds: NDArray[np.int64], min_areas: NDArray[np.int64]) -> None:
        framed = (width + 2) * (height + 2)
        if framed > MAX_PIXELS:
            raise DataError(f"a map must have at most {MAX_PIXELS} pixels, found {width}x{height}")
        self._ranks = np.searchsorted(thresholds, np.arange(256)).astype(np.int16)
        self._min_areas = min_areas
        self._pixels = np.empty(framed, PIXEL)
        self.area, self.overlap = self._tables = np.empty((2, len(thresholds), len(min_areas)), np.int64)

    def sweep(self, levels: NDArray[np.uint8], truth: NDArray[np.uint8]) -> None:
        """Fill `area` and `overlap`, (T, A): the pixels, and true pixels, that each threshold and min area keeps.

        `levels` and `truth` (0 or 1) are (W, H) uint8, C-contiguous.
        """
        sweep(levels, truth, self._ranks, self._min_areas, self._pixels, self._tables)

    def sweep_image(self, image: LabelledMaps) -> tuple[NDArray[Any], ...]:
        """Return dice (C, T, A), true pixels (C,), above (C, 256) and loss (C,) of an image, as in `DiceTables`."""
        width, height = image.levels.shape[1:]
        dice, true_pixels, above, loss = [], [], [], []
        for levels, bits in zip(image.levels, image.truth, strict=True):
            one = np.array(levels, order="C")
            truth = unpack_mask(bits, (height, width)).T
            self.sweep(one, truth)
            true_pixels.append(int(truth.sum()))
            dice.append(self.dice(true_pixels[-1]))
            counts = np.bincount(one.ravel(), minlength=256)
            above.append(one.size - np.cumsum(counts))
            inside = np.bincount(one[truth > 0], minlength=256)
            loss.append((inside @ _LOSSES + (counts - inside) @ _LOSSES[::-1]) / one.size)
        return np.stack(dice), np.array(true_pixels), np.stack(above), np.array(loss)

    def dice(self, true_pixels: int) -> NDArray[np.float64]:
        """Return the Dice of the last sweep, (T, A) float64; 1 where both masks are empty."""
        both = self.area + true_pixels
        return np.where(both == 0, 1.0, 2 * self.overlap / np.maximum(both, 1))


def measure(
    maps: Iterable[LabelledMaps],
    count: int,
    thresholds: Sequence[int] = THRESHOLDS,
    min_areas: Sequence[int] = MIN_AREAS,
    threads: int | None = None,
    advance: Callable[[int], object] | None = None,
) -> DiceTables:
    """Return the Dice of every threshold and min area on every map.

    Memory holds a few images at a time and the tables: 8 bytes per image, class, threshold and min area.

    Parameters
    ----------
    maps
        Images of one shape; read lazily.
    count
        Largest number of images.
    thresholds
        Levels 0..255 to try.
    min_areas
        Pixels to try.
    threads
        Number of threads; by default one per usable core.
    advance
        Called with 1 after each image.

    Raises
    ------
    DataError
        Maps of different shapes, of wrong dtypes or with too many pixels, no images or more than `count`, no threshold
        or min area, or one that is out of range.
    """
    levels, areas = (np.unique(np.asarray(values, np.int64)) for values in (thresholds, min_areas))
    if not len(levels) or not len(areas):
        raise DataError("nothing to search: give at least one threshold and one min area")
    if levels[0] < 0 or levels[-1] > 255 or areas[0] < 0:
        raise DataError(f"thresholds must be within 0..255 and min areas at least 0, found {levels} and {areas}")
    threads = threads or usable_cpus()
    local = threading.local()
    first: list[LabelledMaps] = []
    presences: list[NDArray[np.uint8]] = []

    def checked() -> Iterator[LabelledMaps]:
        for image in maps:
            if not first:
                first.append(image)
            _check_maps(image, first[0])
            if image.presence is not None:
                presences.append(image.presence)
            yield image

    def work(image: LabelledMaps) -> tuple[NDArray[Any], ...]:
        if not hasattr(local, "sweeper"):
            _, width, height = image.levels.shape
            local.sweeper = Sweeper(width, height, levels, areas)
        sweeper: Sweeper = local.sweeper
        return sweeper.sweep_image(image)

    done = 0
    tables: tuple[NDArray[Any], ...] = ()
    with ThreadPoolExecutor(threads) as pool:
        for parts in overlap(pool, work, checked(), 2 * threads):
            if not tables:
                tables = tuple(np.empty((len(part), count, *part.shape[1:]), part.dtype) for part in parts)
            if done == count:
                raise DataError(f"there are more images than count={count}")
            for table, part in zip(tables, parts, strict=True):
                table[:, done] = part
            done += 1
            if advance:
                advance(1)
    if not done:
        raise DataError("nothing to search: no images")
    dice, true_pixels, above, loss = (table[:, :done] for table in tables)
    pixels = first[0].levels[0].size
    return DiceTables(
        pixels, levels, areas, dice, true_pixels, above, loss, np.stack(presences, axis=1) if presences else None
    )


def _check_maps(image: LabelledMaps, first: LabelledMaps) -> None:
    levels, truth, presence = image.levels, image.truth, image.presence
    if levels.ndim != 3 or levels.dtype != np.uint8 or not levels.size:
        raise DataError(f"levels must be (C, W, H) uint8, found {levels.shape} {levels.dtype}")
    classes, width, height = levels.shape
    if truth.shape != (classes, (width * height + 7) // 8) or truth.dtype != np.uint8:
        raise DataError(f"levels {levels.shape} and packed truth {truth.shape} {truth.dtype} do not match")
    if presence is not None and (presence.shape != (classes,) or presence.dtype != np.uint8):
        raise DataError(f"presence must be ({classes},) uint8, found {presence.shape} {presence.dtype}")
    if (presence is None) != (first.presence is None):
        raise DataError("either all images of a search must have presence levels, or none; found both")
    if levels.shape != first.levels.shape:
        raise DataError(f"all maps of a search must have the same shape, found {first.levels.shape} and {levels.shape}")


def search_rules(
    probability: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    thresholds: Sequence[int] = THRESHOLDS,
    min_areas: Sequence[int] = MIN_AREAS,
    threads: int | None = None,
    advance: Callable[[int], object] | None = None,
) -> list[BestRule]:
    """Return the best rule of each class on these images; of equal rules, the first by threshold and min area.

    `probability` is (N, C, W, H) uint8 and `truth` (N, C, ceil(W * H / 8)) uint8; the other arguments and the
    errors are those of `measure`.
    """
    if probability.ndim != 4 or len(truth) != len(probability):
        raise DataError(f"probability {probability.shape} and packed truth {truth.shape} do not match")
    maps = (LabelledMaps(one, bits) for one, bits in zip(probability, truth, strict=True))
    return best_rules(measure(maps, len(probability), thresholds, min_areas, threads, advance))


def best_rules(tables: DiceTables) -> list[BestRule]:
    """Return the threshold and min area with the highest mean Dice of each class; see `search_rules`."""
    best = []
    for dice in tables.dice:
        mean = dice.sum(axis=0) / len(dice)  # summed in the order of the images, for any number of threads
        t, a = np.unravel_index(int(mean.argmax()), mean.shape)
        best.append(BestRule(Rule(int(tables.thresholds[t]), int(tables.min_areas[a])), float(mean[t, a])))
    return best
