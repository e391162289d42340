"""Distributed training: one process is killed, and the resumed run ends with the same weights."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from cloudrt.train.launch import TRAIN, main
from support.training import TOGETHER, weights

RUN = """
import json, os, signal, sys
from pathlib import Path
import torch
from cloudrt.system.terminal import Failure, reports_errors
from cloudrt.train.config import TrainConfig
from cloudrt.train.loop import train
from cloudrt.train.trainer import Trainer
torch.set_num_threads(1)
real, how = Trainer._batch, sys.argv[5]
def batch(self, image, target, position, last):
    if how == "killed" and os.environ["RANK"] == "1" and (self.batches.epoch, position) == (2, 2):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, image, target, position, last)
Trainer._batch = batch
values = json.loads(sys.argv[1])
values["input_size"] = tuple(values["input_size"])
try:
    reports_errors(train)(TrainConfig(**values), *map(Path, sys.argv[2:5]), resume=how == "resumed")
except Failure as failure:  # of the remaining process, if it notices before the launcher stops it
    failure.show()
    sys.exit(failure.exit_code)
"""
LAUNCH = """
import sys
from pathlib import Path
from cloudrt.system.terminal import reports_errors, Failure
from cloudrt.train.launch import launch
try:
    reports_errors(launch)([sys.executable, *sys.argv[1:]], 2)
except Failure as failure:
    failure.show()
    sys.exit(failure.exit_code)
"""


def test_a_killed_process_ends_the_run_in_one_line_and_resume_continues(
    scenes: Path, cached: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.py").write_text(RUN)

    def run(folder: str, how: str) -> subprocess.CompletedProcess[str]:
        words = [json.dumps(TOGETHER.to_dict()), str(scenes), str(tmp_path / folder), str(cached), how]
        command = [sys.executable, "-c", LAUNCH, str(tmp_path / "run.py"), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)

    assert run("whole", "whole").returncode == 0
    killed = run("cut", "killed")
    assert killed.returncode == 2, killed.stderr
    assert "Traceback" not in killed.stderr
    line = killed.stderr.splitlines()[-1]
    assert re.match(r"Error: process 1 of the training ended with SIGKILL; .* with --resume to continue$", line)
    assert (tmp_path / "cut" / "state.pth").exists()
    resumed = run("cut", "resumed")
    assert resumed.returncode == 0, resumed.stderr
    for name in ("last.pth", "best.pth"):
        whole, cut = weights(tmp_path / "whole" / name), weights(tmp_path / "cut" / name)
        assert whole.keys() == cut.keys()
        assert all(torch.equal(whole[key], cut[key]) for key in whole), name


def test_wrong_use_gives_a_one_line_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cloudrt.train.launch"]
    for words, named in (
        (["data/"], "--name is required"),
        (["--processes", "2", "--nodes", "2", "data/", "--name", "x"], "2 machines need --head HOST:PORT"),
        (["--processes", "1", str(tmp_path), "--name", "x"], "process 0 of the training ended with status 2"),
    ):
        done = subprocess.run([*command, *words], capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert named in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", [["--name", "big"], ["--name=big"]])
def test_the_name_of_the_run_is_found(name: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("cloudrt.train.launch.launch", lambda command, *_: started.append(command))
    done = CliRunner().invoke(main, ["--processes", "2", "data", *name])
    assert done.exit_code == 0 and started == [[*TRAIN, "data", *name]]


def test_the_launcher_starts_the_command_for_one_process() -> None:
    done = subprocess.run([*TRAIN, "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert "Train on DATA" in done.stdout


def test_sigterm_ends_the_launcher_with_its_status() -> None:
    stop = (
        "import os, signal, time; os.environ['RANK'] == '0' and os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    )
    command = [sys.executable, "-c", LAUNCH, "-c", stop]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "Traceback" not in done.stderr and "Error" not in done.stderr
