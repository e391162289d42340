"""The commands and snippets of README and docs: found, checked against the real options, and run.

The blocks of a page run in order in one folder. Click first parses every cloudrt command unchanged, with all checks;
then it runs with the options of `SHRINK`, which come last and so replace its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import textwrap
import zipfile
from dataclasses import dataclass
from pathlib import Path

import click
from click.testing import CliRunner
from support.paths import ROOT, setup_config

from cloudrt.cli import main
from cloudrt.system.versions import VERSION

WHEEL = f"dist/cloudrt-{VERSION}-py3-none-any.whl"
"""What `pip wheel` builds."""
_BLOCK = re.compile(
    r"(?:^ *<!-- (?:not run here: (?P<excuse>[^>]+?)|exit status (?P<status>\d+)) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
_SAID = re.compile(r"^print\(.*?\)  # -> (.*)$", re.MULTILINE)
SHELL = ("cat", "cp", "echo", "head", "split")
"""Programs that every machine has."""
ELSEWHERE = ("curl", "docker", "eval", "export", "kaggle", "ray", "sbatch", "sh")
"""Programs that are not run here; a comment before such a block says why."""

_SMALL = [
    *("--epochs", "1", "--input-size", "96x64", "--batch-size", "4", "--accumulate", "1", "--validation-share", "0.3"),
    *("--encoder", "resnet18", "--encoder-weights", "none"),
    *("--set", "decoder_pyramid_channels=32", "--set", "decoder_segmentation_channels=32"),
]
_BENCH = [
    *("--only", "search", "--max-images", "1", "--repeat", "1", "--provider", "cpu", "--batch-size", "1"),
    "--overwrite",
]
SHRINK: dict[str, list[str]] = {
    "train": [*_SMALL, "--folds", "0"],
    "train --folds": [*_SMALL, "--folds", "2", "--max-images", "6"],
    "train --teacher": [*_SMALL, "--max-images", "6"],
    "export": ["--max-images", "2", "--precision", "fp32", "--overwrite"],
    "bench": _BENCH,
    "bench --compare": [*_BENCH, "--tolerance", "1"],
    "bench --truth": [*_BENCH, "--only", "accuracy"],
    "synth": ["-n", "12", "--size", "140x210"],
    "synth --panorama": ["--panorama", "2800x1400", "--size", "700x464", "--days", "2"],
    "infer": ["--provider", "cpu", "--batch-size", "2"],
    "infer --provider": ["--batch-size", "2"],
    "tune": ["--provider", "cpu"],
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, why it cannot run here, if it cannot, and how its last command ends."""

    language: str
    text: str
    excuse: str = ""
    status: int = 0


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page in their order."""
    return [
        Block(found["language"], textwrap.dedent(found["text"]), found["excuse"] or "", int(found["status"] or 0))
        for found in _BLOCK.finditer(page.read_text(encoding="utf-8"))
    ]


def commands(block: Block) -> list[tuple[str, list[str]]]:
    """Return the command lines of a shell block, and their words."""
    text = block.text.replace("\\\n", " ")
    lines = ((line, shlex.split(line, comments=True)) for line in text.splitlines())
    return [(line, words) for line, words in lines if words]


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
        if words[1] == "uninstall":
            assert words[2] == "-y"
            return
        if words[1] == "wheel":
            assert words[2:] == ["--no-deps", "--wheel-dir", "dist", "."]
            return
        assert words[1] == "install"
        known = setup_config()
        for package in words[2:]:
            distribution, _, extras = package.rstrip("]").partition("[")
            assert distribution in (".", WHEEL, "onnxruntime")
            assert all(known.has_option("options.extras_require", extra) for extra in extras.split(",") if extra)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:])
    elif program == "torchrun":
        check(words[words.index("--no-python") + 1 :])
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2])
        if words[2] == "cloudrt.train.launch":
            check(["cloudrt-train", *words[words.index("data/") :]])
    else:
        assert program in (*SHELL, *ELSEWHERE, "unzip"), f"nothing here runs {program}"


def run(line: str, words: list[str], status: int) -> None:
    """Run a command that was checked; `make` and `pip` are skipped."""
    name, rest = _command_of(words)
    if name:
        given = [
            option
            for option in ("--folds", "--teacher", "--compare", "--truth", "--provider", "--panorama")
            if option in rest
        ]
        extra = next((SHRINK[key] for option in given if (key := f"{name} {option}") in SHRINK), SHRINK.get(name, []))
        if name == "synth":
            shutil.rmtree(rest[0], ignore_errors=True)  # the page makes it
        result = CliRunner().invoke(main, [name, *rest, *extra])
        if name == "train" and "--resume" in rest and result.exit_code == 2:
            assert "is finished" in result.output  # nothing has interrupted the run here
            return
        assert result.exit_code == status, f"{line}\n{result.output}\n{result.exception!r}"
    elif words[0] == "unzip":
        with zipfile.ZipFile(words[1]) as archive:
            archive.extractall(words[words.index("-d") + 1])
    elif words[0] in SHELL:
        subprocess.run(["bash", "-ec", line], check=True)
    else:
        assert words[0] in ("make", "pip"), f"say why nothing here runs {words[0]}"


def run_python(text: str, names: dict[str, object]) -> None:
    """Run a snippet, with the variables of those before it; it must print what its `# -> ...` comments state."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(text, "snippet", "exec"), names)
    printed = said.getvalue().splitlines()
    assert [line for line in _SAID.findall(text) if line not in printed] == []


def _command_of(words: list[str]) -> tuple[str, list[str]]:
    if words[0] == "cloudrt":
        return words[1], words[2:]
    return words[0].removeprefix("cloudrt-") if words[0].startswith("cloudrt-") else "", words[1:]
