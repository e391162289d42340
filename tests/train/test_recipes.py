"""The recipes call this version's commands with valid options."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import click
import pytest
from cloudrt.train.config import TrainConfig
from support.paths import ROOT

from cloudrt.cli.export import export
from cloudrt.cli.train import train
from cloudrt.cli.tune import tune

RECIPES = sorted((ROOT / "train" / "recipes").glob("*.sh"))
COMMANDS: dict[str, click.Command] = {"cloudrt-train": train, "cloudrt-export": export, "cloudrt tune": tune}
STUB = """#!/bin/sh
printf '%s\\n' "${0##*/}" "$@" "" >> "$CALLS"
"""


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_commands(path: Path, tmp_path: Path) -> None:
    """The shell runs the recipe with programs that only write down their arguments."""
    for name in ("cloudrt-train", "cloudrt-export", "cloudrt"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    where = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    subprocess.run(["sh", str(path), "some data", "some runs"], env=where, check=True)
    calls = [call.split("\n") for call in (tmp_path / "calls").read_text().removesuffix("\n\n").split("\n\n")]
    calls = [[" ".join(call[:2]), *call[2:]] if call[0] == "cloudrt" else call for call in calls]
    assert [program for program, *_ in calls if program != "cloudrt-train"] == ["cloudrt-export", "cloudrt tune"]
    assert calls[0][0] == "cloudrt-train"
    for program, *arguments in calls:
        values = COMMANDS[program].make_context(program, arguments).params
        if program == "cloudrt-train":
            assert values["data"] == Path("some data")
            named = {name: values[name] for name in TrainConfig.__dataclass_fields__ if name in values}
            TrainConfig(**named | {"options": dict(values["options"]), "workers": 0, "fold": values["fold"] or 0})
