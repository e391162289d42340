"""Folds: near-duplicates stay together, and rules are chosen on all folds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloudrt.train import loop
from cloudrt.train.config import TrainConfig
from cloudrt.train.cross import cross_validate
from cloudrt.train.folds import folds, split_listed
from support.training import SMALL, toy_cache

from cloudrt.data.duplicates import difference_hash, similar_groups
from cloudrt.data.folder import open_data
from cloudrt.data.scenes import draw_scene
from cloudrt.errors import DataError
from cloudrt.model.checkpoint import Checkpoint
from cloudrt.search.choose import choose_rules
from cloudrt.search.probabilities import Probabilities
from cloudrt.search.tables import LabelledMaps, measure, min_areas_for


def test_folds_hold_every_image_once_and_the_classes_in_equal_parts() -> None:
    random = np.random.default_rng(1)
    classes = random.random((401, 4)) < (0.5, 0.4, 0.3, 0.1)
    cache = toy_cache(classes)
    parts = folds(cache, 5, 9)
    assert sorted(np.concatenate(parts)) == [number for number in range(401) if number != 3]
    shares = np.array([classes[part].mean(axis=0) for part in parts])
    assert np.abs(shares - classes.mean(axis=0)).max() < 0.03  # 0.05 or more with random folds
    assert max(map(len, parts)) - min(map(len, parts)) <= 6
    assert all((one == other).all() for one, other in zip(parts, folds(cache, 5, 9), strict=True))
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(parts, folds(cache, 5, 8), strict=True))
    with pytest.raises(DataError, match="500 folds need at least 500"):
        folds(cache, 500, 9)


def test_folds_of_a_hundred_classes() -> None:
    classes = np.random.default_rng(1).random((60, 100)) < 0.5
    assert sorted(np.concatenate(folds(toy_cache(classes), 3, 9))) == [n for n in range(60) if n != 3]


def test_listed_images_are_held_out_and_in_no_fold() -> None:
    cache = toy_cache(np.random.default_rng(1).random((60, 4)) < 0.4)
    names = {cache.names[position] for position in (1, 3, 20, 59)}  # 3 is not readable
    training, held_out = split_listed(cache, names)
    assert held_out.tolist() == [1, 20, 59]
    rest = [n for n in range(60) if n not in (1, 3, 20, 59)]
    assert training.tolist() == rest
    assert sorted(np.concatenate(folds(cache, 3, 9, excluded=names))) == rest
    for names in (set(), {cache.names[3]}, set(cache.names)):
        with pytest.raises(DataError, match="of 59 images would be held out"):
            split_listed(cache, names)


def test_a_run_holds_out_the_images_of_another_one(scenes: Path, cached: Path, tmp_path: Path) -> None:
    first, second, crossed = (tmp_path / name for name in ("first", "second", "crossed"))
    config = replace(SMALL, epochs=1, validation_share=0.3)
    loop.train(config, scenes, first, cached)
    listed = first / "held_out.txt"
    loop.train(replace(config, held_out=str(listed), seed=5), scenes, second, cached)
    assert (second / "held_out.txt").read_text() == listed.read_text()
    cross_validate(replace(config, held_out=str(listed), folds=2), scenes, crossed, cached)
    names = [(crossed / f"fold-{number}" / "held_out.txt").read_text().split() for number in (0, 1)]
    assert sorted([*names[0], *names[1], *listed.read_text().split()]) == sorted(open_data(scenes).read_train())
    listed.write_text("other.jpg\n")
    with pytest.raises(DataError, match=r"has no row of other.jpg"):
        loop.train(replace(config, held_out=str(listed)), scenes, tmp_path / "third", cached)


def test_images_that_look_alike_stay_together() -> None:
    images = np.stack([draw_scene(seed, (64, 96)).image for seed in range(30)])
    twins = np.clip(images.astype(int) + np.random.default_rng(0).integers(-6, 7, images.shape), 0, 255)
    cache = toy_cache(np.ones((60, 3), bool), np.concatenate([images, twins.astype(np.uint8)]))
    cache.failures.clear()
    groups = similar_groups([difference_hash(image) for image in cache.images])
    assert (groups[:30] == groups[30:]).all()
    assert len(set(groups)) > 20
    for part in folds(cache, 4, 0, group_similar=True):
        assert set(part % 30) == set(part[part < 30]) == set(part[part >= 30] - 30)


def test_cross_validation_chooses_rules_on_out_of_fold_predictions(
    scenes: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, epochs=1, folds=3, presence="top-k", top_k=50)
    trained: list[int] = []
    real = loop.train

    def count(one: TrainConfig, *words: Any, **named: Any) -> Any:
        trained.append(one.fold)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return real(one, *words, **named)

    monkeypatch.setattr("cloudrt.train.cross.train", count)
    with pytest.raises(KeyboardInterrupt):
        cross_validate(config, scenes, tmp_path, cached)
    scores = json.loads((tmp_path / "fold-0" / "fold.json").read_text())
    (tmp_path / "fold-0" / "fold.json").unlink()  # as after a kill right before it was written
    done = cross_validate(config, scenes, tmp_path, cached, resume=True)
    assert trained == [0, 1, 1, 2]  # the finished fold was not trained again
    assert json.loads((tmp_path / "fold-0" / "fold.json").read_text()) == scores and done.folds[0] == scores["dice"]
    data = open_data(scenes)
    table = data.read_train()
    held = [set((tmp_path / f"fold-{number}" / "held_out.txt").read_text().split()) for number in range(3)]
    assert set.union(*held) == set(table) and sum(map(len, held)) == len(table)
    with Probabilities(tmp_path / "oof.npz") as kept:
        assert sorted(kept.keys) == sorted(table)
        maps = []
        for key in kept.keys:
            levels, presence = kept.read(key)
            highest = np.sort(levels.reshape(4, -1), axis=1)[:, -50:].mean(axis=1)
            assert presence is not None and np.abs(presence - highest).max() <= 1
            maps.append(LabelledMaps(levels, data.truth_bits(key, table[key]), presence))
    choices = choose_rules(measure(iter(maps), len(maps), min_areas=min_areas_for(data.labels.submit_grid)))
    assert done.dice == pytest.approx(np.mean([choice.out_of_fold for choice in choices]))
    for number in range(3):
        best = Checkpoint.load(tmp_path / f"fold-{number}" / "best.pth")
        assert best.rules == tuple(choice.rule for choice in choices)
    assert json.loads((tmp_path / "folds.json").read_text())["dice"] == done.dice
