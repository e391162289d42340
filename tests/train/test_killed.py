"""Cross-validation that is killed and resumed several times gives the same networks, predictions and rules."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.kills import run_and_kill
from support.networks import OPTIONS

from cloudrt.model.checkpoint import Checkpoint
from cloudrt.search.probabilities import Probabilities

FOLDS = 2


def words(data: Path, cache: Path, runs: Path, *more: str) -> list[str | Path]:
    network = ["--encoder", "resnet18", "--encoder-weights", "none", "--input-size", "96x64"]
    network += [word for key, value in OPTIONS.items() for word in ("--set", f"{key}={value}")]
    schedule = ["--epochs", "2", "--batch-size", "4", "--precision", "fp32", "--device", "cpu"]
    named: list[str | Path] = ["train", data, "--cache", cache, "--runs", runs, "--name", "run", "--folds", str(FOLDS)]
    return [*named, *network, *schedule, *more]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_cross_validation_survives_kills(scenes: Path, cached: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    _, changes = run_and_kill(words(scenes, cached, whole), whole / "run")
    random = np.random.default_rng(0)
    assert run_and_kill(words(scenes, cached, cut), cut / "run", 4)[0] == -9
    kills = [int(random.integers(changes // (5 - number))) for number in range(4)]
    for after in (*kills, -1):
        status, _ = run_and_kill(words(scenes, cached, cut, "--resume"), cut / "run", after)
        assert status == (0 if after < 0 else -9)
    assert (cut / "run" / "folds.json").read_text() == (whole / "run" / "folds.json").read_text()
    for fold in range(FOLDS):
        ours, theirs = (Checkpoint.load(runs / "run" / f"fold-{fold}" / "best.pth") for runs in (cut, whole))
        assert (ours.rules, ours.dice, ours.epoch) == (theirs.rules, theirs.dice, theirs.epoch)
        assert all(torch.equal(ours.weights[name], value) for name, value in theirs.weights.items())
    with Probabilities(cut / "run" / "oof.npz") as ours_kept, Probabilities(whole / "run" / "oof.npz") as theirs_kept:
        assert ours_kept.keys == theirs_kept.keys
        for key in ours_kept.keys:
            assert np.array_equal(ours_kept.read(key)[0], theirs_kept.read(key)[0])
    assert not list(cut.rglob("*.part"))  # what the killed processes left
