"""Write and read the JSON files in `bench/results`, and format their figures for Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from cloudrt.bench.machine import machine, versions

from cloudrt.system.versions import package_versions

RESULTS = Path(__file__).parents[1] / "results"
EARLIER = "one EfficientNet-Lite0 network at 384x256"
"""The model that shipped before the present one, with which many of the files were measured."""


def save(found: dict[str, Any], output: Path | None, *packages: str) -> None:
    """Print figures as JSON with the machine and the versions, those of `packages` included; write them to `output`."""
    about = {"machine": machine(), "versions": versions() | package_versions(*packages)}
    text = json.dumps(about | found, indent=2)
    click.echo(text)
    if output:
        output.write_text(text + "\n", encoding="utf-8")


def load(name: str) -> dict[str, Any]:
    """Return the content of a file."""
    loaded: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def name_file(name: str) -> str:
    """Return the path of a file as the pages show it."""
    return f"`bench/results/{name}.json`"


def describe_machine(*names: str) -> str:
    """Return where the figures of some files were measured: a line for each machine."""
    files: dict[str, list[str]] = {}
    for name in names:
        machine = load(name)["machine"]
        cores = machine.get("usable_cores", machine.get("cores"))
        files.setdefault(f"{machine['cpu']}, {cores} cores", []).append(name_file(name))
    return "\n".join(f"Measured on {machine} ({', '.join(those)})." for machine, those in files.items())


def name_peer(name: str) -> str:
    """Return a peer as the tables name it: "the notebook's way, ONNX Runtime" is "notebook (ONNX Runtime)"."""
    what, _, how = name.partition(", ")
    return f"notebook ({how})" if what.startswith("the notebook") else name


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def relative_speed(way: dict[str, Any], plain: dict[str, Any]) -> float:
    """Return the speed of a way relative to another that was timed alternately: the median over the rounds."""
    pairs = zip(plain["timing"]["repetitions_s"], way["timing"]["repetitions_s"], strict=True)
    return float(np.median([theirs / ours for theirs, ours in pairs]))


def spread(*timings: dict[str, Any]) -> str:
    """Return half the relative interquartile range of a product or quotient of timings, such as " ± 3%"."""
    return f" ± {np.hypot.reduce([timing['iqr_s'] / timing['median_s'] for timing in timings]) / 2:.0%}"


def speedup(ratio: float, *timings: dict[str, Any]) -> str:
    """Return a ratio and, for given timings, its spread."""
    return f"{two_digits(ratio)}x{spread(*timings) if timings else ''}"


def two_digits(value: float) -> str:
    """Return a ratio with two or three significant digits."""
    return f"{value:,.{0 if value >= 20 else 1 if value >= 5 else 2}f}"


def signed(value: float) -> str:
    """Return a difference of Dice with its sign."""
    return f"{value:+.4f}" if abs(value) >= 0.00005 else "0.0000"
