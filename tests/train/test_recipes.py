"""The recipes are valid command lines of this version."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
import pytest
from cloudrt.train.config import TrainConfig
from support.paths import ROOT

from cloudrt.cli.export import export
from cloudrt.cli.train import _options, train
from cloudrt.cli.tune import tune

RECIPES = sorted((ROOT / "train" / "recipes").glob("*.sh"))
COMMANDS: dict[str, click.Command] = {"cloudrt-train": train, "cloudrt-export": export, "cloudrt tune": tune}


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_commands(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    words = [[" ".join(line[:2]), *line[2:]] if line[:1] == ["cloudrt"] else line for line in words]
    commands = [line for line in words if line and line[0] in COMMANDS]
    assert [line[0] for line in commands][:2] == ["cloudrt-train", "cloudrt-export"]
    for program, *arguments in commands:
        values = COMMANDS[program].make_context(program, arguments).params
        if program == "cloudrt-train":
            named = {name: values[name] for name in TrainConfig.__dataclass_fields__ if name in values}
            TrainConfig(**named | {"options": _options(values["options"]), "workers": 0})
