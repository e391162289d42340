"""Runs in the folder of an earlier run: other options or data, incomplete files, a second process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from cloudrt.train import epochs
from cloudrt.train.cross import cross_validate
from cloudrt.train.folds import folds
from cloudrt.train.loop import train
from support import training
from support.files import file_size_limit
from support.training import interrupt_after, toy_cache, train_arguments

from cloudrt.cli.train import train as command
from cloudrt.errors import DataError
from cloudrt.model.checkpoint import Checkpoint
from cloudrt.system import files
from cloudrt.system.files import partial_path

SMALL = replace(training.SMALL, accumulate=1, validation_share=0.25)


def run(data: Path, runs: Path, *more: str) -> Result:
    return CliRunner().invoke(command, train_arguments(data, runs, runs / "cache", *more))


def test_a_run_that_was_interrupted_in_its_first_epoch_continues(
    scenes: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after its first checkpoint was written, before the state of that epoch."""
    with monkeypatch.context() as patch:
        real = epochs.Run._save_state

        def stop(self: Any, epoch: int) -> None:
            if epoch:
                raise KeyboardInterrupt
            real(self, epoch)

        patch.setattr(epochs.Run, "_save_state", stop)
        with pytest.raises(KeyboardInterrupt):
            train(SMALL, scenes, tmp_path / "cut", cached)
    assert (tmp_path / "cut" / "best.pth").exists()
    train(SMALL, scenes, tmp_path / "cut", cached, resume=True)
    train(SMALL, scenes, tmp_path / "whole", cached)
    ours, whole = (Checkpoint.load(tmp_path / name / "last.pth").weights for name in ("cut", "whole"))
    assert all(torch.equal(ours[name], value) for name, value in whole.items())
    with pytest.raises(DataError, match="is finished"):
        train(SMALL, scenes, tmp_path / "cut", cached, resume=True)


def test_overwriting_removes_the_earlier_run(
    scenes: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(replace(SMALL, epochs=1), scenes, tmp_path, cached)
    # Files of earlier runs with other options.
    for name in ("tensorboard/events", "fold-0/best.pth", "folds.json", "oof.npz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("of an earlier run")
    (tmp_path / "fold-1").symlink_to(scenes)
    partial = partial_path(tmp_path / "state.pth").name
    (tmp_path / f"{partial.rpartition('-')[0]}-1.part").write_bytes(b"of a killed run")
    files._remove_leftovers.cache_clear()
    interrupt_after(0, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(replace(SMALL, seed=7), scenes, tmp_path, cached)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "held_out.txt", "state.pth", ".lock"}
    assert (scenes / "train.csv").exists()


def test_a_run_is_not_resumed_on_changed_data(
    scenes: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            train(SMALL, data, tmp_path / "run", cached)
    lines = (data / "train.csv").read_text().splitlines(keepends=True)
    (data / "train.csv").write_text("".join(lines[:-8]))
    with pytest.raises(DataError, match="was trained on other images or classes"):
        train(SMALL, data, tmp_path / "run", cached, resume=True)


def test_resuming_without_folds_keeps_a_cross_validation(scenes: Path, cached: Path, tmp_path: Path) -> None:
    best = tmp_path / "fold-1" / "best.pth"
    best.parent.mkdir()
    best.write_text("of a complete fold")
    for config in (SMALL, replace(SMALL, folds=3, fold=1)):
        with pytest.raises(DataError, match="is a cross-validation: resume it with its --folds and without --fold"):
            train(config, scenes, tmp_path, cached, resume=True)
    assert best.read_text() == "of a complete fold"


@pytest.mark.parametrize("name", ["state.pth", "best.pth"])
def test_resuming_with_folds_refuses_a_single_run(name: str, scenes: Path, cached: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text("of a run")
    with pytest.raises(DataError, match="is a single run: resume it with its own options"):
        cross_validate(replace(SMALL, folds=2), scenes, tmp_path, cached, resume=True)
    assert not (tmp_path / "fold-0").exists()


@pytest.mark.parametrize(
    "words", [("--encoder", "resnet19"), ("--folds", "900"), ("--folds", "2", "--device", "cuda:99")]
)
def test_a_refused_run_leaves_no_folder(scenes: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    done = run(scenes, tmp_path / "runs", *words)
    assert done.exit_code == 2, done.output
    assert not (tmp_path / "runs" / "run").exists()


@pytest.mark.parametrize("content", [{}, [], {"config": {}}, {"config": []}])
def test_a_state_with_other_content_is_reported_as_damaged(
    content: Any, scenes: Path, cached: Path, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "state.pth")
    with pytest.raises(DataError, match=r"state.pth is damaged"):
        train(SMALL, scenes, tmp_path, cached, resume=True)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX locks")
@pytest.mark.parametrize("folds", [0, 2])
def test_two_runs_do_not_write_one_folder(scenes: Path, cached: Path, tmp_path: Path, folds: int) -> None:
    (tmp_path / "fold-0").mkdir()  # of the other run
    script = (
        "import sys, fcntl\nfile = open(sys.argv[1], 'ab')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(DataError, match="is being written by another run"):
            (cross_validate if folds else train)(replace(SMALL, folds=folds), scenes, tmp_path, cached)
        other.communicate()
    assert (tmp_path / "fold-0").exists()


def test_folds_are_not_trained_by_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DataError, match="in one process"):
        cross_validate(replace(SMALL, folds=2), tmp_path, tmp_path, tmp_path)


def test_a_cross_validation_is_replaced_only_by_one_that_starts(
    scenes: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "folds.json",
        "oof.npz",
        "best.pth",
        "config.json",
        *(f"fold-{n}/{name}" for n in (0, 1, 5) for name in ("best.pth", "fold.json")),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("of an earlier run")
    before = sorted(path for path in tmp_path.rglob("*"))
    config = replace(SMALL, folds=2)
    for change in ({"encoder": "resnet19"}, {"folds": 900}, {"device": "cuda:99"}):
        with pytest.raises(DataError):
            cross_validate(replace(config, **change), scenes, tmp_path, cached)
        assert sorted(path for path in tmp_path.rglob("*") if path.name != ".lock") == before
    interrupt_after(0, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        cross_validate(config, scenes, tmp_path, cached)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert names == {"fold-0/config.json", "fold-0/held_out.txt", "fold-0/state.pth"}


@pytest.mark.parametrize("words", [(), ("--folds", "3")])
@pytest.mark.parametrize("name", ["best.pth", "fold-7/best.pth"])
def test_an_earlier_run_is_not_removed_if_it_is_read(
    scenes: Path, tmp_path: Path, name: str, words: tuple[str, ...]
) -> None:
    checkpoint = tmp_path / "again" / name
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("of an earlier run")
    done = run(scenes, tmp_path, "--name", "again", "--overwrite", "--init", str(checkpoint), *words)
    assert done.exit_code == 2 and "use another name" in done.output
    assert checkpoint.read_text() == "of an earlier run"


@pytest.mark.slow
def test_folds_of_another_run_are_not_reused(scenes: Path, cached: Path, tmp_path: Path) -> None:
    config = replace(SMALL, epochs=1, folds=2)
    first = cross_validate(config, scenes, tmp_path, cached)
    assert json.loads((tmp_path / "folds.json").read_text())["folds"] == list(first.folds)
    with pytest.raises(DataError, match="is finished"):
        cross_validate(config, scenes, tmp_path, cached, resume=True)
    (tmp_path / "folds.json").unlink()  # as if it had been killed at the very end
    assert cross_validate(config, scenes, tmp_path, cached, resume=True) == first
    (tmp_path / "folds.json").unlink()
    with pytest.raises(DataError, match="loss was bce"):
        cross_validate(replace(config, loss="dice"), scenes, tmp_path, cached, resume=True)
    (tmp_path / "fold-5").mkdir()  # of a run with more folds
    cross_validate(config, scenes, tmp_path, cached)
    assert sorted(path.name for path in tmp_path.glob("fold-*")) == ["fold-0", "fold-1"]


def test_folds_of_few_images() -> None:
    parts = folds(toy_cache(np.eye(6, 3, dtype=bool)), 3, 0)
    assert sorted(np.concatenate(parts).tolist()) == [0, 1, 2, 4, 5]  # the fourth cannot be read
    assert all(len(part) for part in parts)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", "-1"], "seed must be from 0"),
        (["--seed", "4294967296"], "seed must be from 0"),
        (["--weight-decay", "nan"], "weight_decay must be finite"),
        (["--set", "upsampling=2"], "the network's output is 48x32, not 96x64"),
        (["--set", "activation=sigmoid"], "cloudrt sets this argument itself"),
        (["--set", "kwargs=1"], "no argument of FPN named 'kwargs'"),
        (["--group-similar"], "group_similar needs folds"),
        (["--device", "mps"], "no device named 'mps'"),
        (["--device", "meta"], "no device named 'meta'"),
        (["--input-size", "32x32", "--batch-size", "1"], "fails at this input size"),
    ],
)
def test_options_that_cannot_work_give_a_one_line_error(
    scenes: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    done = run(scenes, tmp_path, *words)
    assert done.exit_code == 2 and said in done.output
    assert "Traceback" not in done.output


def test_without_a_home_folder_no_cache_is_written_to_the_working_folder(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without HOME and without an entry in the table of users, as in some containers, "~" is not expanded."""
    monkeypatch.setattr("cloudrt.cli.train.cache_folder", lambda kind: Path("~", kind))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(command, [str(scenes), "--encoder", "resnet19", "--encoder-weights", "none"])
    assert done.exit_code == 2 and "no home folder" in done.output
    assert not list(tmp_path.iterdir())


def test_a_grid_smaller_than_top_k_trains_without_it(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "train_images").mkdir(parents=True)
    (data / "data.json").write_text('{"classes": ["a"], "label_grid": [64, 80], "submit_grid": [32, 40]}')
    random = np.random.default_rng(0)
    rows = ["Image_Label,EncodedPixels"]
    for number in range(5):
        cv2.imwrite(str(data / "train_images" / f"{number}.png"), random.integers(0, 255, (64, 80, 3), np.uint8))
        rows.append(f"{number}.png_a,{'1 900' if number % 2 else ''}")
    (data / "train.csv").write_text("\n".join(rows) + "\n")
    done = run(data, tmp_path, "--batch-size", "2")
    assert done.exit_code == 0, done.output
    refused = run(data, tmp_path, "--presence", "top-k", "--overwrite")
    assert refused.exit_code == 2 and "top_k must be from 1 to the grid's 1280 pixels" in refused.output


def test_a_full_disk_leaves_no_partial_file(scenes: Path, cached: Path, tmp_path: Path) -> None:
    """A real limit on the size of files, which a checkpoint exceeds."""
    with file_size_limit(1_000_000), pytest.raises(OSError, match="File too large"):
        train(SMALL, scenes, tmp_path, cached)
    assert not list(tmp_path.glob(".*.part"))
