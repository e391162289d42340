"""The commands and snippets of README and docs: found, checked against the real options, and run.

A page is a story: its blocks run one after the other in one folder. Every cloudrt command is first parsed as it stands,
by click and all its checks; then it is run with `SHRINK` after its own options, of which the last one counts.
"""

from __future__ import annotations

import configparser
import importlib
import re
import shlex
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import click
from click.testing import CliRunner

from cloudrt.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"(?:<!-- not run here: ([^>]+?) -->\n)?^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)

_SMALL = ["--epochs", "1", "--input-size", "96x64", "--batch-size", "4", "--accumulate", "1", "--encoder", "resnet18",
          "--encoder-weights", "none", "--set", "decoder_pyramid_channels=32", "--set",
          "decoder_segmentation_channels=32", "--validation-share", "0.3"]  # fmt: skip
_BENCH = ["--only", "search", "--images", "1", "--repeat", "1", "--provider", "cpu", "--batch-size", "1"]
SHRINK: dict[str, list[str]] = {
    "train": [*_SMALL, "--folds", "0"],
    "train --folds": [*_SMALL, "--folds", "2", "--limit", "6"],
    "export": ["--images", "2", "--precision", "fp32"],
    "bench": ["--only", "search", "--images", "1", "--repeat", "1", "--provider", "cpu", "--batch-size", "1"],
    "bench --compare": [
        "--only",
        "search",
        "--images",
        "1",
        "--provider",
        "cpu",
        "--batch-size",
        "1",
        "--tolerance",
        "1",
    ],
    "synth": ["-n", "12", "--size", "140x210"],
    "infer": ["--provider", "cpu", "--batch-size", "2"],
    "infer --provider": ["--batch-size", "2"],
    "tune": ["--provider", "cpu"],
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and why it cannot run here, if it cannot."""

    language: str
    text: str
    excuse: str


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page in their order."""
    found = _BLOCK.findall(page.read_text(encoding="utf-8"))
    return [Block(language, text, excuse) for excuse, language, text in found]


def commands(block: Block) -> list[list[str]]:
    """Return the command lines of a shell block, as words."""
    text = block.text.replace("\\\n", " ")
    lines = (shlex.split(line, comments=True) for line in text.splitlines())
    return [words for words in lines if words]


def check(words: list[str]) -> None:
    """Fail where a command does not exist or would not take its options."""
    name, rest = _command_of(words)
    if name:
        command = main.get_command(click.Context(main), name)
        assert command, f"no command {name}"
        command.make_context(name, list(rest))
        return
    program = words[0]
    if program == "pip":
        assert words[1] == "install"
        known = configparser.ConfigParser()
        known.read(ROOT / "setup.cfg")
        for package in words[2:]:
            distribution, _, extras = package.rstrip("]").partition("[")
            assert distribution == "cloudrt"
            assert all(known.has_option("options.extras_require", extra) for extra in extras.split(",") if extra)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:])
    elif program == "torchrun":
        check(words[words.index("--no-python") + 1 :])
    elif words[:2] == ["python", "-m"]:
        importlib.import_module(words[2])
    else:
        assert program in ("unzip", "split", "docker"), f"nothing here runs {program}"


def run(words: list[str]) -> None:
    """Run a command that was checked; what installs or needs other machines is left at that."""
    name, rest = _command_of(words)
    if name:
        given = [option for option in ("--folds", "--compare", "--provider") if option in rest]
        extra = next((SHRINK[key] for option in given if (key := f"{name} {option}") in SHRINK), SHRINK.get(name, []))
        if name == "synth":
            shutil.rmtree(rest[0], ignore_errors=True)  # the page makes it
        result = CliRunner().invoke(main, [name, *rest, *extra])
        if name == "train" and "--resume" in rest and result.exit_code == 2:
            assert "is finished" in result.output  # nothing has cut it short here
            return
        assert result.exit_code == 0, f"{' '.join(words)}\n{result.output}\n{result.exception!r}"
    elif words[0] == "unzip":
        with zipfile.ZipFile(words[1]) as archive:
            archive.extractall(words[words.index("-d") + 1])
    elif words[0] == "split":
        lines = Path(words[-2]).read_text().splitlines()
        Path(f"{words[-1]}00.txt").write_text("\n".join(lines[: len(lines) // 4 + 1]))


def run_python(text: str) -> None:
    """Run a snippet in a name space of its own."""
    exec(compile(text, "snippet", "exec"), {"__name__": "snippet"})


def _command_of(words: list[str]) -> tuple[str, list[str]]:
    if words[0] == "cloudrt":
        return words[1], words[2:]
    return words[0].removeprefix("cloudrt-") if words[0].startswith("cloudrt-") else "", words[1:]
