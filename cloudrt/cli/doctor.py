"""`cloudrt doctor`: versions, what works on this machine, and what to install."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cloudrt.cli.types import FILE
from cloudrt.system.terminal import reports_errors

if TYPE_CHECKING:
    from rich.table import Table

    from cloudrt.doctor import Diagnosis


@click.command()
@click.argument("model", required=False, type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reports_errors
def doctor(model: Path | None, as_json: bool) -> None:
    """Show versions, what works on this machine, and what to install.

    Every provider is tested with a small graph. With MODEL, an artifact, its metadata is shown too.
    """
    about: dict[str, Any] | None = None
    refused: dict[str, str] = {}
    if model is not None:
        from cloudrt.engines.availability import NAMES
        from cloudrt.engines.choice import int8_problem
        from cloudrt.model.artifact import read_artifact

        artifact = read_artifact(model)
        about = artifact.to_dict()
        refused = {name: reason for name in NAMES if (reason := int8_problem(name, artifact)) is not None}
    from cloudrt.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        values = diagnosis.to_dict() | ({"model": about, "not_for_this_model": refused} if about else {})
        click.echo(json.dumps(values, indent=2))
        return
    _show(diagnosis, str(model), about, refused)


def _show(diagnosis: Diagnosis, model: str, about: dict[str, Any] | None, refused: dict[str, str]) -> None:
    from rich.console import Console

    console = Console()
    machine = diagnosis.machine
    console.print(_two_columns("Versions", diagnosis.versions))
    about_machine = {
        "system": machine.system,
        "processor": f"{machine.cpu} ({', '.join(machine.features)})" if machine.features else machine.cpu,
        "usable cores": str(machine.cores),
        "memory": f"{machine.memory:.1f} GiB" if machine.memory else "unknown",
        "GPU": "\n".join(machine.gpus) or "none found",
    }
    console.print(_two_columns("Machine", about_machine))
    if about is not None:
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
        console.print(_two_columns(model, texts))
    states = {state.name: "works" if state.works else f"no: {state.reason}" for state in diagnosis.providers}
    for name, reason in refused.items():
        states[name] = f"{states.get(name, 'not tried')}; not for this artifact: {reason}"
    console.print(_two_columns("Providers", states))
    # Printed outside the tables, which would wrap these lines, so that commands can be copied.
    missing = [f"For {state.name}: {state.remedy}" for state in diagnosis.providers if not state.works]
    for line in (*diagnosis.conflicts, *diagnosis.advice, *missing, *diagnosis.untested):
        click.echo(line)


def _two_columns(title: str, rows: dict[str, str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))
    return table
