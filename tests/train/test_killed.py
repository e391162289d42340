"""Cross-validation that is killed and resumed several times gives the same networks, predictions and rules."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.kills import run_and_kill
from support.training import train_arguments

from cloudrt.model.checkpoint import Checkpoint
from cloudrt.search.probabilities import Probabilities

FOLDS = 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_cross_validation_survives_kills(scenes: Path, cached: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = ["--folds", str(FOLDS), "--epochs", "2", "--batch-size", "4", "--precision", "fp32"]

    def run(runs: Path, after: int = -1, *resume: str) -> tuple[int, int]:
        return run_and_kill(["train", *train_arguments(scenes, runs, cached, *more, *resume)], runs / "run", after)

    _, changes = run(whole)
    random = np.random.default_rng(0)
    assert run(cut, 4)[0] == -9
    kills = [int(random.integers(changes // (5 - number))) for number in range(4)]
    for after in (*kills, -1):
        status, _ = run(cut, after, "--resume")
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
