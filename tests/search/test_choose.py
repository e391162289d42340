"""The choice of a rule: plateaus before peaks, only gates that raise the Dice, and out-of-fold figures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from cloudrt.errors import DataError
from cloudrt.masks.rule import Rule
from cloudrt.search import choose
from cloudrt.search.choose import FOLDS, RuleChoice, choose_rules, score_rule
from cloudrt.search.tables import DiceTables

THRESHOLDS = np.arange(0, 256, 8)
AREAS = np.arange(0, 1000, 100)
PIXELS = 10_000


def make_tables(
    dice: NDArray[np.float64],
    *,
    positive: NDArray[np.bool_] | None = None,
    above: NDArray[np.int64] | None = None,
    presence: NDArray[np.uint8] | None = None,
) -> DiceTables:
    """Tables of one class from (N, T, A) Dice."""
    images = len(dice)
    true_pixels = np.where(np.ones(images, bool) if positive is None else positive, 500, 0)[None]
    levels = np.full((1, images, 256), 1000) if above is None else above
    loss = np.zeros((1, images))
    return DiceTables(PIXELS, THRESHOLDS, AREAS, dice[None], true_pixels, levels, loss, presence)


def surface(value: Callable[[int, int], float]) -> NDArray[np.float64]:
    return np.array([[value(int(t), int(a)) for a in AREAS] for t in THRESHOLDS])


def noisy(mean: NDArray[np.float64], images: int = 60, noise: float = 0.02, seed: int = 0) -> NDArray[np.float64]:
    return mean + np.random.default_rng(seed).normal(0, noise, (images, 1, 1))


def test_a_plateau_is_taken_before_a_spike() -> None:
    hill = surface(lambda t, a: 0.6 - abs(t - 96) / 400 - abs(a - 300) / 4000)
    hill[25, 8] = 0.65  # one threshold and area alone
    (choice,) = choose_rules(make_tables(noisy(hill)))
    assert choice.peak == Rule(200, 800)
    assert choice.rule == Rule(96, 300)
    assert choice.score.dice < choice.peak_score.dice
    assert choice.surface.shape == hill.shape
    assert np.allclose(choice.surface - choice.surface.mean(), hill - hill.mean())


def average(table: NDArray[np.float64], t: int, a: int) -> float:
    """The mean over the neighbourhood, by slices: here one threshold and one area to either side."""
    return float(table[max(t - 1, 0) : t + 2, max(a - 1, 0) : a + 2].mean())


def plain_choice(dice: NDArray[np.float64]) -> tuple[int, int]:
    mean = dice.mean(axis=0)
    places = [(average(mean, t, a), -t, -a) for t in range(len(THRESHOLDS)) for a in range(len(AREAS))]
    _, t, a = max(places)
    return -t, -a


@pytest.mark.parametrize("seed", range(5))
def test_out_of_fold_figures_are_those_of_a_plain_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = int(rng.integers(11, 40))
    dice = np.clip(
        surface(lambda t, a: 0.6 - abs(t - 120) / 300 - a / 5000) + rng.normal(0, 0.2, (images, 32, 10)), 0, 1
    )
    (choice,) = choose_rules(make_tables(dice), seed=3)
    assert not choice.rule.gate_pixels  # every image passes every gate, or none does
    fold = np.random.default_rng(3).permutation(images) % FOLDS
    out_of_fold = np.empty(images)
    for f in range(FOLDS):
        t, a = plain_choice(dice[fold != f])
        assert choice.fold_rules[f] == Rule(int(THRESHOLDS[t]), int(AREAS[a]))
        out_of_fold[fold == f] = dice[fold == f, t, a]
    t, a = plain_choice(dice)
    assert choice.rule == Rule(int(THRESHOLDS[t]), int(AREAS[a]))
    assert choice.score.dice == pytest.approx(dice[:, t, a].mean(), abs=1e-12)
    assert choice.out_of_fold == pytest.approx(out_of_fold.mean(), abs=1e-12)
    assert choice.error == pytest.approx(out_of_fold.std(ddof=1) / images**0.5, abs=1e-12)
    assert choice.peak_score.dice == pytest.approx(dice.mean(axis=0).max(), abs=1e-12)


def gated_case(seed: int, helps: bool) -> tuple[DiceTables, NDArray[np.bool_]]:
    """With `helps`, the number of bright pixels shows which half of the images lacks the class; else none lacks it."""
    rng = np.random.default_rng(seed)
    positive = np.arange(80) % 2 == 0 if helps else np.ones(80, bool)
    dice = np.where(positive[:, None, None], surface(lambda t, a: 0.6 - abs(t - 96) / 400 - a / 9000), 0.0)
    bright = (
        np.where(positive, rng.integers(400, 900, 80), rng.integers(0, 90, 80)) if helps else rng.integers(0, 900, 80)
    )
    levels = np.arange(256)
    above = np.where(levels[None] < 200, 5000, 0) + bright[:, None] * (levels[None] < 230)
    return make_tables(dice, positive=positive, above=above[None]), positive


def test_a_gate_is_kept_only_if_it_raises_the_dice() -> None:
    tables, positive = gated_case(1, helps=True)
    (choice,) = choose_rules(tables)
    assert 200 <= choice.rule.gate_threshold < 230
    assert 90 <= choice.rule.gate_pixels <= 450
    assert choice.score.negatives == 1.0
    assert choice.score.dice == pytest.approx(0.8, abs=0.03)
    assert choice.out_of_fold > 0.75
    by_hand = np.where(positive, tables.dice[0, :, *np.argwhere(choice.rule.threshold == THRESHOLDS)[0], 0], 1.0)
    assert choice.score.dice == pytest.approx(by_hand.mean(), abs=0.02)

    tables, _ = gated_case(2, helps=False)
    (choice,) = choose_rules(tables)
    assert choice.rule.gate_pixels == 0


def test_presence_is_searched_where_the_network_has_it() -> None:
    rng = np.random.default_rng(4)
    positive = np.arange(80) % 4 == 0
    dice = np.where(positive[:, None, None], surface(lambda t, a: 0.7 - abs(t - 96) / 400 - a / 9000), 0.0)
    presence = np.where(positive, rng.integers(150, 255, 80), rng.integers(0, 100, 80)).astype(np.uint8)[None]
    (choice,) = choose_rules(make_tables(dice, positive=positive, presence=presence))
    assert 100 <= choice.rule.presence <= 150
    assert choice.score.negatives == 1.0
    (without,) = choose_rules(make_tables(dice, positive=positive))
    assert without.rule.presence == 0
    assert without.score.dice < choice.score.dice


def test_gate_and_presence_are_searched_together() -> None:
    """A third of the images lacks the class and has few bright pixels, a third lacks it and has low presence."""
    rng = np.random.default_rng(5)
    kind = np.arange(90) % 3
    positive = kind == 2
    dice = np.where(positive[:, None, None], surface(lambda t, a: 0.7 - abs(t - 96) / 400 - a / 9000), 0.0)
    bright = np.where(kind == 0, rng.integers(0, 90, 90), rng.integers(400, 900, 90))
    above = np.where(np.arange(256) < 150, 5000, 0) + bright[:, None]
    presence = np.where(kind == 1, rng.integers(0, 100, 90), rng.integers(150, 255, 90)).astype(np.uint8)
    tables = make_tables(dice, positive=positive, above=above[None], presence=presence[None])
    (choice,) = choose_rules(tables)
    rule = choice.rule
    assert 100 <= rule.presence <= 150 and rule.gate_threshold >= 150 and 90 <= rule.gate_pixels <= 450
    assert choice.score.negatives == 1.0
    assert abs(rule.threshold - 96) <= 16
    assert choice.surface.shape == dice.shape[1:]


def test_the_joint_search_of_gate_and_presence_is_that_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rules of a small grid, one by one."""
    monkeypatch.setattr(choose, "GATE_THRESHOLDS", (150, 180, 200, 220))
    monkeypatch.setattr(choose, "GATE_SHARES", (0.001, 0.02))
    monkeypatch.setattr(choose, "PRESENCES", (0, 60, 120, 180))
    rng = np.random.default_rng(6)
    positive = rng.random(40) < 0.5
    dice = np.where(positive[:, None, None], rng.random((40, 32, 10)), (rng.random((40, 32, 10)) < 0.5).astype(float))
    above = np.sort(rng.integers(0, 4000, (40, 256)), axis=1)[:, ::-1].copy()
    presence = rng.integers(0, 256, 40).astype(np.uint8)
    tables = make_tables(dice, positive=positive, above=above[None], presence=presence[None])
    *_, both = choose._families(tables, 0)
    sums = choose._sums(tables, 0, both, np.ones(40, bool))
    counts = [round(share * PIXELS) for share in (0.001, 0.02)]
    assert sums.shape == (2, 2, 2, 8, 10)
    for (p, g, c, t, a), found in np.ndenumerate(sums):
        shown = (above[:, (150, 200)[g]] >= counts[c]) & (presence >= (0, 120)[p])
        assert found == pytest.approx(np.where(shown, dice[:, 4 * t, a], ~positive).sum(), abs=1e-9)
    best = np.unravel_index(sums.argmax(), sums.shape)
    rule = choose._highest(tables, both, sums, smooth=False)
    assert rule == Rule(
        int(THRESHOLDS[4 * best[3]]), int(AREAS[best[4]]), (150, 200)[best[1]], counts[best[2]], (0, 120)[best[0]]
    )


def test_scores_of_images_with_and_without_the_class() -> None:
    dice = noisy(surface(lambda t, a: 0.5), images=10, noise=0.1)
    positive = np.arange(10) < 4
    score = score_rule(make_tables(dice, positive=positive), 0, Rule(96, 300))
    assert score.positives == pytest.approx(dice[:4, 12, 3].mean())
    assert score.negatives == pytest.approx(dice[4:, 12, 3].mean())
    assert np.isnan(score_rule(make_tables(dice), 0, Rule(96, 300)).negatives)


def test_folds_are_bounded_by_the_images() -> None:
    dice = noisy(surface(lambda t, a: 0.5 - t / 1000), images=3)
    (choice,) = choose_rules(make_tables(dice), folds=10)
    assert len(choice.fold_rules) == 3
    with pytest.raises(DataError, match="two images"):
        choose_rules(make_tables(dice[:1]))
    with pytest.raises(DataError, match="two folds"):
        choose_rules(make_tables(dice), folds=1)


def test_the_choice_is_the_same_every_time() -> None:
    dice = noisy(surface(lambda t, a: 0.5), noise=0.2)

    def facts(choice: RuleChoice) -> tuple[object, ...]:
        return choice.rule, choice.out_of_fold, choice.fold_rules

    assert facts(choose_rules(make_tables(dice))[0]) == facts(choose_rules(make_tables(dice))[0])


@pytest.mark.parametrize(("shift", "kept"), [(0.0, True), (0.1, False)])
def test_a_previous_rule_is_replaced_only_by_a_better_one_out_of_fold(shift: float, kept: bool) -> None:
    """The expected Dice of the previous rule is `shift` below the plateau; noise makes others score higher here."""
    rng = np.random.default_rng(5)
    mean = surface(lambda t, a: 0.6 - (shift if (t, a) == (128, 500) else 0))
    dice = mean + rng.normal(0, 0.05, (30, *mean.shape))
    tables, before = make_tables(dice), Rule(128, 500)
    (new,) = choose_rules(tables)
    (choice,) = choose_rules(tables, before=[before])
    assert new.rule == choice.found != before
    own = dice[:, 128 // 8, 500 // 100]
    assert choice.gain == pytest.approx(new.out_of_fold - own.mean())
    assert choice.kept == kept == (choice.gain <= choice.gain_error)
    assert choice.rule == (before if kept else new.rule)
    if kept:
        assert (choice.score.dice, choice.out_of_fold) == pytest.approx((own.mean(), own.mean()))
        assert np.allclose(choice.surface, dice.mean(axis=0))
