"""The study of the number of held-out images: tables of subsets, Dice on unseen images, loss relative to all images."""

from __future__ import annotations

import numpy as np
import pytest
from cloudrt.bench.studies import held_out
from cloudrt.bench.studies.held_out import measure_losses, score_choice, take

from cloudrt.masks.rle import pack_mask
from cloudrt.search.choose import choose_rules
from cloudrt.search.tables import DiceTables, LabelledMaps, measure


def maps(count: int) -> list[LabelledMaps]:
    random = np.random.default_rng(4)
    found = []
    for _ in range(count):
        levels = random.integers(0, 256, (2, 12, 10), np.uint8)
        truth = np.stack([pack_mask((random.integers(90, 160) < plane.T).astype(np.uint8)) for plane in levels])
        found.append(LabelledMaps(levels, truth, random.integers(0, 256, 2, np.uint8)))
    return found


def tables(images: list[LabelledMaps]) -> DiceTables:
    return measure(iter(images), len(images), range(80, 180, 10), (0, 5))


def test_some_images_give_the_tables_of_these_alone() -> None:
    images = maps(9)
    some = np.array([7, 2, 4])
    ours, wanted = take(tables(images), some), tables([images[number] for number in some])
    for name in ("dice", "true_pixels", "above", "loss", "presence"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(wanted, name))


def test_the_score_is_that_of_the_rules_on_other_images() -> None:
    images = maps(20)
    every = tables(images)
    seen, unseen = np.arange(14), np.arange(14, 20)
    rules = [choice.rule for choice in choose_rules(tables(images[:14]))]
    wanted = [every.of_rule(label, rule)[14:].mean() for label, rule in enumerate(rules)]
    assert score_choice(every, seen, unseen) == pytest.approx(np.mean(wanted))


def test_losses_are_relative_to_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "COUNTS", (4, 8, 100))
    found = measure_losses(tables(maps(20)), 3)
    assert [row["images"] for row in found["counts"]] == [4, 8, 16]
    assert found["counts"][-1]["lost"] == found["counts"][-1]["error"] == 0
    for row in found["counts"]:
        assert row["lost"] == pytest.approx(found["counts"][-1]["dice"] - row["dice"])
