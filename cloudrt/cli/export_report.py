"""What `cloudrt-export` says of an artifact: tables, lines and a file of figures."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from cloudrt.export.export import Exported, Source
    from cloudrt.model.parity import Verdict

SHOWN = 8
"""How many layers are named on the terminal."""


def speed_text(done: Exported) -> str:
    """Return how fast an artifact is beside fp32, for a table."""
    if done.artifact.precision == "fp32":
        return "1.00x"
    if done.speed is not None:
        return f"{done.speed:.2f}x"
    return "as fp32" if done.artifact.precision == "fp16" else "not run"


def say_done(done: Exported) -> None:
    """Say what was written."""
    artifact = done.artifact
    click.echo(f"{done.path}: {artifact.precision}, {done.bytes / 1e6:.1f} MB")
    if artifact.kept_fp32:
        names = ", ".join(artifact.kept_fp32[:SHOWN])
        more = f" and {len(artifact.kept_fp32) - SHOWN} more" if len(artifact.kept_fp32) > SHOWN else ""
        click.echo(
            f"{len(artifact.kept_fp32)} of {done.layers} layers stay in fp32, or the gate would not pass: {names}{more}"
            f"; cloudrt doctor {done.path} lists them"
        )
    if done.speed is not None:
        slower = "; the fp32 artifact is the better one here" if done.speed < 0.95 else ""
        click.echo(f"{done.speed:.2f}x the speed of fp32 in {done.parity.provider} on this machine{slower}")


def write_figures(path: Path, source: Source, written: list[Exported]) -> None:
    """Write what was measured, on which machine, by which versions; names no file, folder or user."""
    from cloudrt.system.files import replacing
    from cloudrt.system.machine import describe_machine

    members = source.ensemble.checkpoints
    values = {
        "machine": asdict(describe_machine()) | {"system": f"{platform.system()} {platform.machine()}"},
        "versions": written[0].artifact.versions if written else {},
        "networks": [f"{one.config.architecture} with {one.config.encoder}" for one in members],
        "input_size": list(source.ensemble.config.input_size),
        "tta": source.ensemble.tta,
        "calibrated_on": {"images": len(source.calibration.names), "source": source.calibration.source},
        "artifacts": [
            {
                "precision": done.artifact.precision,
                "int8_target": done.artifact.int8_target,
                "bytes": done.bytes,
                "parity": done.parity.to_dict(),
                "tolerances": asdict(done.tolerances),
                "layers": done.layers,
                "kept_fp32": list(done.artifact.kept_fp32),
                "speed_beside_fp32": done.speed,
            }
            for done in written
        ],
    }
    with replacing(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n")


def show_verdicts(title: str, verdicts: tuple[Verdict, ...] | list[Verdict]) -> None:
    """Show every figure beside what is allowed."""
    signs = {True: "passed", False: "FAILED", None: ""}
    rows = [(one.figure, one.found, one.allowed, signs[one.passed]) for one in verdicts]
    show_table(title, ("figure", "found", "allowed", ""), rows)


def show_table(title: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Show a table, its first column to the left and all others to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
