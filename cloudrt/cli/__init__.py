"""The command group. A command's module is imported when it is called or its help is asked for, not before."""

from __future__ import annotations

from importlib import import_module

import click

from cloudrt.system.versions import VERSION

COMMANDS = {
    "train": "Train a segmentation network and find the rule of each class.",
    "export": "Turn a checkpoint into an ONNX artifact that gives the same submission.",
    "infer": "Write the submission of a folder of images.",
    "bench": "Measure every stage and the whole, beside the notebook's way.",
    "tune": "Search the rule of each class on labelled images, and write them into the artifact.",
    "explore": "Show what a labelled data set holds, and what is doubtful in it.",
    "synth": "Write a data set of made-up scenes.",
    "score": "Compute the competition's Dice of a submission.",
    "doctor": "Show versions, what works on this machine, and what to install.",
}


class LazyGroup(click.Group):
    """A group whose commands are loaded by name from `cloudrt.cli.NAME`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _command(cmd_name) if cmd_name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="cloudrt")
def main() -> None:
    """Cloud-organisation segmentation: train, export, infer, and measure each step.

    Try it on made-up scenes: cloudrt synth scenes && cloudrt infer scenes/test_images --report
    """


def _command(name: str) -> click.Command:
    command = getattr(import_module(f"cloudrt.cli.{name}"), name)
    assert isinstance(command, click.Command)
    command.context_settings.setdefault("help_option_names", ["-h", "--help"])
    return command


def train() -> None:
    """`cloudrt-train`."""
    _command("train")(prog_name="cloudrt-train")


def export() -> None:
    """`cloudrt-export`."""
    _command("export")(prog_name="cloudrt-export")


def infer() -> None:
    """`cloudrt-infer`."""
    _command("infer")(prog_name="cloudrt-infer")


def bench() -> None:
    """`cloudrt-bench`."""
    _command("bench")(prog_name="cloudrt-bench")
