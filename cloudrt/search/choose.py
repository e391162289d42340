"""Choice of rules that generalise to other images, from the exact tables of `tables.py`.

The mean Dice of every threshold and min area is a surface, whose maximum is often a narrow peak that fits these images
by chance. Therefore the surface is smoothed by a moving average along each axis, and the rule at the maximum of the
smoothed surface is chosen. Cross-validation estimates the Dice of such a choice on unseen images:

    folds --choose on the others--> one rule per fold --score on the fold--> out-of-fold Dice of every image

A gate (the class is empty unless enough pixels exceed a high level) and the presence output are each searched together
with all thresholds and min areas, and then both at once on the coarser grid of `JOINT`. Each is used only if it raises
the out-of-fold Dice by more than the standard error of the difference. A previous rule is replaced under the same
condition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import DataError
from cloudrt.masks.rule import Rule
from cloudrt.search.tables import DiceTables

FOLDS = 5
GATE_THRESHOLDS = tuple(range(95, 256, 10))
GATE_SHARES = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.045, 0.06, 0.08, 0.1)
"""Fraction of the grid's pixels that must exceed the threshold of the gate."""
PRESENCES = tuple(range(0, 256, 4))
JOINT = {"threshold": 4, "gate_threshold": 2, "presence": 2}
"""Strides of the thresholds, gate thresholds and presence levels when gate and presence are searched together."""

TIE = 1e-9
"""Sums of Dice that differ by less are equal. Of equal rules, the one nearest to their mean position is chosen; without
smoothing, the first."""

REACH = 1 / 32
"""Half-width of the moving average, as a fraction of the number of values along an axis; at least one value."""


@dataclass(frozen=True)
class RuleScore:
    """Mean Dice of a rule.

    Parameters
    ----------
    dice
        Mean over all images.
    negatives, positives
        Mean over the images without and with the class; NaN if there are none.
    """

    dice: float
    negatives: float
    positives: float


@dataclass(frozen=True)
class RuleChoice:
    """The chosen rule of a class, and estimates of its Dice.

    Parameters
    ----------
    rule
        The chosen rule.
    score
        Its score on the images that it was chosen on.
    out_of_fold, error
        Cross-validated mean Dice of this selection, and its standard error. If the previous rule was kept, its mean
        Dice.
    peak, peak_score, peak_out_of_fold
        Rule at the maximum of the surface without smoothing, its score, and the cross-validated mean Dice.
    fold_rules
        For each fold, the rule that the search found without the images of the fold.
    surface
        (T, A): mean Dice of every threshold and min area, with the gate and presence of `rule`.
    found
        The rule that the search found; it is `rule` unless the previous rule was kept.
    gain, gain_error
        Out-of-fold Dice of `found` minus the Dice of the previous rule, and the standard error of the difference; NaN
        without a previous rule.
    """

    rule: Rule
    score: RuleScore
    out_of_fold: float
    error: float
    peak: Rule
    peak_score: RuleScore
    peak_out_of_fold: float
    fold_rules: tuple[Rule, ...]
    surface: NDArray[np.float64]
    found: Rule
    gain: float
    gain_error: float

    @property
    def kept(self) -> bool:
        """Whether the previous rule was kept, because the gain of the new one did not exceed its standard error."""
        return self.rule != self.found


def score_rule(tables: DiceTables, label: int, rule: Rule) -> RuleScore:
    """Return the score of a rule for class number `label`; the errors are those of `DiceTables.of_rule`."""
    return _score(tables.of_rule(label, rule), tables.true_pixels[label] > 0)


def _score(dice: NDArray[np.float64], positive: NDArray[np.bool_]) -> RuleScore:
    parts = (dice, dice[~positive], dice[positive])
    return RuleScore(*(float(part.mean()) if len(part) else float("nan") for part in parts))


def choose_rules(
    tables: DiceTables, folds: int = FOLDS, seed: int = 0, before: Sequence[Rule] = ()
) -> list[RuleChoice]:
    """Choose a rule for each class.

    Parameters
    ----------
    tables
        From `cloudrt.search.tables.measure`.
    folds
        Number of folds; limited to the number of images.
    seed
        Seed of the shuffle that assigns images to folds.
    before
        The previous rules, one per class; their thresholds and min areas must be in the tables. A new rule replaces a
        previous rule only if its out-of-fold Dice is higher by more than the standard error of the difference.

    Raises
    ------
    DataError
        Fewer than two folds or images, or a previous rule that is not in the tables.
    """
    fold = assign_folds(tables.dice.shape[1], folds, seed)
    previous = tuple(before) or (None,) * len(tables.dice)
    return [_choose(tables, label, fold, rule) for label, rule in enumerate(previous)]


def assign_folds(images: int, folds: int = FOLDS, seed: int = 0) -> NDArray[np.int_]:
    """Return the fold of each image, (N,), at random; see `choose_rules`."""
    if folds < 2 or images < 2:
        raise DataError(f"cross-validation needs at least two folds and two images, found {folds} and {images}")
    return np.random.default_rng(seed).permutation(images) % min(folds, images)


@dataclass(frozen=True)
class _RuleFamily:
    """Rules that are searched together: thresholds and min areas with each of several gates and presence levels.

    Parameters
    ----------
    kinds
        The gates and presence levels, as rules without threshold and min area, in the shape of their grid.
    shown
        (K, N) bool: whether each of the K kinds keeps the class on each image.
    step
        Stride of the thresholds.
    """

    kinds: NDArray[np.object_]
    shown: NDArray[np.bool_]
    step: int = 1


def _families(tables: DiceTables, label: int) -> Iterator[_RuleFamily]:
    counts = sorted({max(1, round(share * tables.pixels)) for share in GATE_SHARES})

    def family(kinds: list[Any], step: int = 1) -> _RuleFamily:
        rules = np.array(kinds, object)
        return _RuleFamily(rules, np.stack([tables.shown(label, rule) for rule in rules.ravel()]), step)

    yield family([Rule(0, 0)])
    yield family([[Rule(0, 0, gate, count) for count in counts] for gate in GATE_THRESHOLDS])
    if tables.presence is not None:
        yield family([Rule(0, 0, presence=presence) for presence in PRESENCES])
        gates, presences = GATE_THRESHOLDS[:: JOINT["gate_threshold"]], PRESENCES[:: JOINT["presence"]]
        kinds = [[[Rule(0, 0, gate, count, level) for count in counts] for gate in gates] for level in presences]
        yield family(kinds, JOINT["threshold"])


@dataclass(frozen=True)
class _Selection:
    """The rule chosen from a family.

    Parameters
    ----------
    rule
        The rule chosen on all images.
    fold_rules
        For each fold, the rule chosen without its images.
    out_of_fold
        (N,): Dice of each image with the rule of its fold.
    """

    rule: Rule
    fold_rules: tuple[Rule, ...]
    out_of_fold: NDArray[np.float64]


def _choose(tables: DiceTables, label: int, fold: NDArray[np.int_], before: Rule | None) -> RuleChoice:
    plain, *others = _families(tables, label)
    best = _select(tables, label, plain, fold, smooth=True)
    for family in others:
        selection = _select(tables, label, family, fold, smooth=True)
        more = selection.out_of_fold - best.out_of_fold
        if more.mean() > _error(more):
            best = selection
    peak = _select(tables, label, plain, fold, smooth=False)
    found, gain, gain_error = best.rule, float("nan"), float("nan")
    if before is not None:
        previous = tables.of_rule(label, before)
        difference: NDArray[np.float64] = best.out_of_fold - previous
        gain, gain_error = float(difference.mean()), _error(difference)
        if gain <= gain_error:
            best = _Selection(before, best.fold_rules, previous)
    return RuleChoice(
        rule=best.rule,
        score=score_rule(tables, label, best.rule),
        out_of_fold=float(best.out_of_fold.mean()),
        error=_error(best.out_of_fold),
        peak=peak.rule,
        peak_score=score_rule(tables, label, peak.rule),
        peak_out_of_fold=float(peak.out_of_fold.mean()),
        fold_rules=best.fold_rules,
        surface=_surface(tables, label, best.rule),
        found=found,
        gain=gain,
        gain_error=gain_error,
    )


def _surface(tables: DiceTables, label: int, rule: Rule) -> NDArray[np.float64]:
    """Return the mean Dice of every threshold and min area with the gate and presence of a rule, (T, A)."""
    family = _RuleFamily(np.array([replace(rule, threshold=0, min_area=0)], object), tables.shown(label, rule)[None])
    everything = np.ones(tables.dice.shape[1], bool)
    surface: NDArray[np.float64] = _sums(tables, label, family, everything)[0] / len(everything)
    return surface


def _error(values: NDArray[np.float64]) -> float:
    """Return the standard error of the mean."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _select(tables: DiceTables, label: int, family: _RuleFamily, fold: NDArray[np.int_], smooth: bool) -> _Selection:
    """Choose a rule from a family on all images, and one without the images of each fold."""
    sums = np.stack([_sums(tables, label, family, fold == f) for f in range(fold.max() + 1)])
    total = sums.sum(axis=0)
    rule = _highest(tables, family, total, smooth)
    fold_rules = []
    out_of_fold = np.empty(len(fold))
    for f, one in enumerate(sums):
        chosen = _highest(tables, family, total - one, smooth)
        fold_rules.append(chosen)
        out_of_fold[fold == f] = tables.of_rule(label, chosen)[fold == f]
    return _Selection(rule, tuple(fold_rules), out_of_fold)


def _sums(tables: DiceTables, label: int, family: _RuleFamily, chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the sum of Dice over the `chosen` images for every rule of a family, (*kinds.shape, T, A)."""
    dice = np.ascontiguousarray(tables.dice[label, chosen, :: family.step])
    shown = family.shown[:, chosen].astype(np.float64)
    empty = (tables.true_pixels[label, chosen] == 0).astype(np.float64)
    sums = shown @ dice.reshape(len(dice), -1) + ((1 - shown) @ empty)[:, None]
    sums_by_kind: NDArray[np.float64] = sums.reshape(*family.kinds.shape, *dice.shape[1:])
    return sums_by_kind


def _highest(tables: DiceTables, family: _RuleFamily, surface: NDArray[np.float64], smooth: bool) -> Rule:
    """Return the rule at the maximum of a surface, which is averaged first if `smooth`."""
    if smooth:
        for axis in range(surface.ndim):
            surface = _average(surface, axis)
    ties = np.argwhere(surface >= surface.max() - TIE)  # the rounding of a sum depends on its order
    middle = ((ties - ties.mean(axis=0)) ** 2).sum(axis=1).argmin() if smooth else 0
    *place, t, a = (int(i) for i in ties[middle])
    kind: Rule = family.kinds[tuple(place)]
    return replace(kind, threshold=int(tables.thresholds[t * family.step]), min_area=int(tables.min_areas[a]))


def _average(surface: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Return the moving average along an axis, with half-width `REACH`; at the ends, over the values that exist."""
    count = surface.shape[axis]
    length = 2 * max(1, round(REACH * count)) + 1
    last = axis == surface.ndim - 1
    planes = surface.reshape(1, -1, count) if last else surface.reshape(int(np.prod(surface.shape[:axis])), count, -1)

    def window(plane: NDArray[np.float64]) -> NDArray[np.float64]:
        size = (length, 1) if last else (1, length)  # (width, height), as in OpenCV
        return np.asarray(cv2.boxFilter(plane, -1, size, normalize=False, borderType=cv2.BORDER_CONSTANT), np.float64)

    inside = window(np.ones((1, count) if last else (count, 1)))
    return np.stack([window(plane) / inside for plane in planes]).reshape(surface.shape)
