"""The command group. The module of a command is only imported to run it or to show its help."""

from __future__ import annotations

from copy import copy
from difflib import get_close_matches
from functools import partial
from importlib import import_module

import click

from cloudrt.system.versions import VERSION

COMMANDS = {
    "train": "Train a segmentation network and find the rule of each class.",
    "export": "Convert a checkpoint to an ONNX artifact, and compare it with PyTorch.",
    "infer": "Segment images and write a submission.",
    "serve": "Serve a model over HTTP, with a web page to try it.",
    "bench": "Measure speed and accuracy, and compare them with other implementations.",
    "tune": "Find the best rule of each class on labelled images, and store the rules in the artifact.",
    "explore": "Write a page about a labelled data set: statistics, examples and possible errors.",
    "grid": "Write daily frequencies on a coarse grid from a store of daily masks.",
    "synth": "Write a data set of synthetic images.",
    "score": "Compute the competition's Dice of a submission.",
    "doctor": "Show versions, what works on this machine, and what to install.",
}


OTHER_NAMES = {"predict": "infer", "segment": "infer", "evaluate": "score", "benchmark": "bench", "convert": "export"}
"""Names of commands in other programs -> our command."""


class LazyGroup(click.Group):
    """A group that loads its commands by name from `cloudrt.cli.NAME`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _command(cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = [OTHER_NAMES[name]] if name in OTHER_NAMES else get_close_matches(name, COMMANDS, 2, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the commands are {', '.join(COMMANDS)}"
            ctx.fail(f"no command {name!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="cloudrt")
def main() -> None:
    """Cloud-organisation segmentation: train, export, infer, and measure each step.

    Try it on synthetic images:

    \b
      cloudrt synth scenes
      cloudrt infer scenes/test_images --report
    """


def _command(name: str) -> click.Command:
    command = getattr(import_module(f"cloudrt.cli.{name}"), name)
    assert isinstance(command, click.Command)
    command.context_settings.setdefault("help_option_names", ["-h", "--help"])
    return command


def _run(name: str) -> None:
    """Run a command under its own name, `cloudrt-NAME`, with --version."""
    program, command = f"cloudrt-{name}", copy(_command(name))
    command.params = list(command.params)
    click.version_option(VERSION, prog_name=program)(command)(prog_name=program)


train, export, infer, bench = (partial(_run, name) for name in ("train", "export", "infer", "bench"))
