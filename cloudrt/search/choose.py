"""The rule of a class that should hold on unseen images, chosen from the exact tables of `search.py`.

The highest point of a Dice surface is often a spike: one threshold and min area that suit these images by luck. The
choice is the highest point of the surface averaged over its neighbourhood, a plateau; and what such a choice is worth
is measured by cross-validation, on the images that it was not made on:

    folds --choose on the others--> a rule a fold --score on the fold--> out-of-fold Dice of every image

A gate (the triplet rule: the class is empty unless enough pixels exceed a high level) and the presence output are
searched together with every threshold and min area. Each stays only where its out-of-fold Dice is higher than without
by more than the standard error of the difference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import DataError
from cloudrt.masks.postprocess import Rule
from cloudrt.search.tables import DiceTables

FOLDS = 5
GATE_THRESHOLDS = tuple(range(95, 256, 10))
GATE_SHARES = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.045, 0.06, 0.08, 0.1)
"""Of the grid's pixels: how many must exceed the gate's threshold."""
PRESENCES = tuple(range(0, 256, 4))

TIE = 1e-9
"""Sums of Dice that differ by less are equal; of equal rules the one in their middle is chosen."""

REACH = 1 / 32
"""How far the neighbourhood of a rule reaches to either side, as a share of the values tried; one value at least."""


@dataclass(frozen=True)
class Score:
    """Mean Dice over images, and over those without and with the class; NaN where there are none of a kind."""

    dice: float
    negatives: float
    positives: float


@dataclass(frozen=True)
class Choice:
    """The rule of one class, what it scores, and how far that can be trusted.

    Parameters
    ----------
    rule
        The choice.
    score
        On the images that it was chosen on.
    out_of_fold, error
        Mean Dice on images that a rule chosen in the same way had not seen, and its standard error.
    spike, spike_score, spike_out_of_fold
        The same for the highest point of the surface, without the neighbourhood.
    fold_rules
        What each fold's other images chose.
    surface
        (T, A): mean Dice of every threshold and min area, under the gate and presence of `rule`.
    """

    rule: Rule
    score: Score
    out_of_fold: float
    error: float
    spike: Rule
    spike_score: Score
    spike_out_of_fold: float
    fold_rules: tuple[Rule, ...]
    surface: NDArray[np.float64]


def score_rule(tables: DiceTables, label: int, rule: Rule) -> Score:
    """Return what a rule of the class numbered `label` scores; see `DiceTables.of_rule` for the errors."""
    return _score(tables.of_rule(label, rule), tables.true_pixels[label] > 0)


def _score(dice: NDArray[np.float64], positive: NDArray[np.bool_]) -> Score:
    parts = (dice, dice[~positive], dice[positive])
    return Score(*(float(part.mean()) if len(part) else float("nan") for part in parts))


def choose_rules(tables: DiceTables, folds: int = FOLDS, seed: int = 0) -> list[Choice]:
    """Return the choice for each class.

    Parameters
    ----------
    tables
        From `cloudrt.search.tables.measure`.
    folds
        In how many parts the images are cut, after a seeded shuffle; at most one a image.

    Raises
    ------
    DataError
        Fewer than two folds or two images.
    """
    images = tables.dice.shape[1]
    if folds < 2 or images < 2:
        raise DataError(f"cross-validation needs two folds and two images at least, found {folds} and {images}")
    fold = np.random.default_rng(seed).permutation(images) % min(folds, images)
    return [_choose(tables, label, fold) for label in range(len(tables.dice))]


@dataclass(frozen=True)
class _Family:
    """Rules that differ in threshold, in min area and in what else decides emptiness.

    `kinds` are the rules without threshold and min area, in the shape of the grid that they were made from; `shown`
    (K, N) says on which images each leaves the class standing.
    """

    kinds: NDArray[np.object_]
    shown: NDArray[np.bool_]


def _families(tables: DiceTables, label: int) -> list[_Family]:
    kinds: list[list[list[Rule]]] = [[[Rule(0, 0)]]]
    counts = sorted({max(1, round(share * tables.pixels)) for share in GATE_SHARES})
    kinds.append([[Rule(0, 0, gate, count) for count in counts] for gate in GATE_THRESHOLDS])
    if tables.presence is not None:
        kinds.append([[Rule(0, 0, presence=presence) for presence in PRESENCES]])
    families = []
    for kind in kinds:
        rules = np.array(kind, object)
        families.append(_Family(rules, np.stack([tables.shown(label, rule) for rule in rules.ravel()])))
    return families


@dataclass(frozen=True)
class _Trial:
    """What came of choosing from one family in one way: the rule, the folds' rules and the out-of-fold Dice, (N,)."""

    rule: Rule
    fold_rules: tuple[Rule, ...]
    out_of_fold: NDArray[np.float64]
    surface: NDArray[np.float64]


def _choose(tables: DiceTables, label: int, fold: NDArray[np.int_]) -> Choice:
    families = _families(tables, label)
    best = _try(tables, label, families[0], fold, smooth=True)
    for family in families[1:]:
        trial = _try(tables, label, family, fold, smooth=True)
        gain = trial.out_of_fold - best.out_of_fold
        if gain.mean() > _error(gain):
            best = trial
    spike = _try(tables, label, families[0], fold, smooth=False)
    return Choice(
        best.rule,
        score_rule(tables, label, best.rule),
        float(best.out_of_fold.mean()),
        _error(best.out_of_fold),
        spike.rule,
        score_rule(tables, label, spike.rule),
        float(spike.out_of_fold.mean()),
        best.fold_rules,
        best.surface,
    )


def _error(values: NDArray[np.float64]) -> float:
    """Return the standard error of the mean."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _try(tables: DiceTables, label: int, family: _Family, fold: NDArray[np.int_], smooth: bool) -> _Trial:
    """Choose from a family on all images, and for each fold on the others."""
    sums = np.stack([_sums(tables, label, family, fold == f) for f in range(fold.max() + 1)])
    total = sums.sum(axis=0)
    rule, place = _highest(tables, family, total, smooth)
    fold_rules = []
    out_of_fold = np.empty(len(fold))
    for f, one in enumerate(sums):
        chosen, _ = _highest(tables, family, total - one, smooth)
        fold_rules.append(chosen)
        out_of_fold[fold == f] = tables.of_rule(label, chosen)[fold == f]
    return _Trial(rule, tuple(fold_rules), out_of_fold, total[place] / len(fold))


def _sums(tables: DiceTables, label: int, family: _Family, chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the sum of Dice over the chosen images of every rule of a family: (*kinds, T, A)."""
    dice = tables.dice[label, chosen]
    shown = family.shown[:, chosen].astype(np.float64)
    empty = (tables.true_pixels[label, chosen] == 0).astype(np.float64)
    sums = shown @ dice.reshape(len(dice), -1) + ((1 - shown) @ empty)[:, None]
    sums_by_kind: NDArray[np.float64] = sums.reshape(*family.kinds.shape, *dice.shape[1:])
    return sums_by_kind


def _highest(
    tables: DiceTables, family: _Family, surface: NDArray[np.float64], smooth: bool
) -> tuple[Rule, tuple[int, ...]]:
    """Return the rule of the highest point, and where in `kinds` it lies."""
    if smooth:
        for axis in range(surface.ndim):
            surface = _average(surface, axis)
    ties = np.argwhere(surface >= surface.max() - TIE)  # sums in another order differ by rounding alone
    middle = ((ties - ties.mean(axis=0)) ** 2).sum(axis=1).argmin() if smooth else 0
    *place, t, a = (int(i) for i in ties[middle])
    kind = family.kinds[tuple(place)]
    return replace(kind, threshold=int(tables.thresholds[t]), min_area=int(tables.min_areas[a])), tuple(place)


def _average(surface: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Return the mean over `REACH` of the values to either side along an axis, fewer at the ends."""
    count = surface.shape[axis]
    length = 2 * max(1, round(REACH * count)) + 1
    last = axis == surface.ndim - 1
    planes = surface.reshape(1, -1, count) if last else surface.reshape(int(np.prod(surface.shape[:axis])), count, -1)

    def window(plane: NDArray[np.float64]) -> NDArray[np.float64]:
        size = (length, 1) if last else (1, length)  # width and height, as OpenCV has it
        return np.asarray(cv2.boxFilter(plane, -1, size, normalize=False, borderType=cv2.BORDER_CONSTANT), np.float64)

    inside = window(np.ones((1, count) if last else (count, 1)))
    return np.stack([window(plane) / inside for plane in planes]).reshape(surface.shape)
