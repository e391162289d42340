"""The output of `cloudrt-export`: the parity table of each precision, and the files that were written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import click

from cloudrt.cli.run_options import suggested_inputs
from cloudrt.system.terminal import Failure

if TYPE_CHECKING:
    from cloudrt.engines.tensorrt_check import TensorrtCheck
    from cloudrt.export.export import Exported
    from cloudrt.export.request import ExportRequest
    from cloudrt.export.run import ExportSummary, PrecisionResult

SHOWN = 8
"""Maximum number of layer names on the terminal."""


def show_result(result: PrecisionResult) -> None:
    """Print every figure of a precision beside its limit, and the artifact that was written."""
    signs = {True: "passed", False: "FAILED", None: ""}
    rows = [(one.figure, one.found, one.allowed, signs[one.passed]) for one in result.verdicts]
    _show_table(result.title, ("figure", "found", "allowed", ""), rows)
    done = result.exported
    if done is None:
        return
    if not done.parity.has_rules:
        click.echo("The checkpoint has no rules, so there are no masks: only the probabilities were compared.")
    elif done.parity.worst:
        click.echo(f"Lowest Dice: {', '.join(done.parity.worst)}")
    artifact = done.artifact
    click.echo(f"{done.path}: {artifact.precision}, {done.bytes / 1e6:.1f} MB")
    if artifact.kept_fp32:
        names = ", ".join(artifact.kept_fp32[:SHOWN])
        more = f" and {len(artifact.kept_fp32) - SHOWN} more" if len(artifact.kept_fp32) > SHOWN else ""
        click.echo(
            f"{len(artifact.kept_fp32)} of {done.layers} layers stay in fp32 so that the gate passes: {names}{more}; "
            f"cloudrt doctor {done.path} lists them"
        )
    if done.speed is not None:
        slower = "; use the fp32 artifact here" if done.speed < 0.95 else ""
        click.echo(f"{done.speed:.2f}x the speed of fp32 in {done.parity.provider} on this machine{slower}")
    if isinstance(done.tensorrt, str):
        click.echo(f"TensorRT refuses the artifact: {done.tensorrt}")
    elif done.tensorrt:
        show_checks({done.path: done.tensorrt})


def show_checks(checks: Mapping[Path, TensorrtCheck]) -> None:
    """Print the result of parsing artifacts and building their engines with TensorRT."""
    for path, one in checks.items():
        click.echo(f"{path}: accepted by TensorRT for RTX {one.version}, {one.layers} layers")
    rows = [
        (path.name, engine.target, f"{engine.bytes / 1e6:.1f}", f"{engine.seconds:.1f}")
        for path, one in checks.items()
        for engine in one.engines
    ]
    if rows:
        _show_table("TensorRT engines", ("artifact", "GPUs", "MB", "built in s"), rows)


def show_refusals(done: ExportSummary) -> None:
    """Raise Failure if TensorRT refuses an artifact that was written."""
    refused = [f"{one.path}: {one.tensorrt}" for one in done.written if isinstance(one.tensorrt, str)]
    if refused:
        raise Failure(f"written, but refused by TensorRT: {'; '.join(refused)}")


def show_all(done: ExportSummary) -> None:
    """Print one table of all precisions, and why some were refused."""
    rows: list[tuple[str, ...]] = []
    for one in done.written:
        parity, kept = one.parity, len(one.artifact.kept_fp32)
        rows.append(
            (
                one.artifact.precision,
                f"{one.bytes / 1e6:.1f}",
                f"{parity.dice:.4f}" if parity.has_rules else "-",
                f"{parity.mean_difference:.3f}",
                f"{parity.empty_mismatch:.2%}" if parity.has_rules else "-",
                f"{kept} of {one.layers}" if one.layers else "-",
                _speed_text(one),
                {str: "refused", type(None): "-"}.get(type(one.tensorrt), "accepted"),
            )
        )
    for precision, error in done.refused.items():
        click.echo(f"{precision}: {error}", err=True)
        rows.append((precision, "refused", *[""] * 6))
    columns = ("", "MB", "Dice", "difference", "empty in one", "fp32 layers", "speed", "TensorRT")
    _show_table("Parity with PyTorch fp32; speed relative to the fp32 artifact", columns, rows)


def show_next(request: ExportRequest, done: ExportSummary) -> None:
    """Print what else was written, and the command that uses the artifact."""
    last = done.written[-1]
    if last.networks_per_image > 1:
        rules = f"those of {request.checkpoints[0]}: tune them on held-out images with cloudrt tune {last.path} DATA"
        if len(request.checkpoints) > 1 and done.shared_rules:
            rules = "shared by all members"
        click.echo(f"{last.networks_per_image} networks run for each image; the rules are {rules}")
    if done.triton:
        click.echo(f"{done.triton}: a Triton model")
    if done.engine_seconds is not None:
        click.echo(f"The engine for batches of {request.batch_size} was built in {done.engine_seconds:.0f} s")
    elsewhere = last.artifact.int8_target == "tensorrt" and last.parity.provider != "tensorrt"
    where, option = (", where TensorRT is installed", " --provider tensorrt") if elsewhere else ("", "")
    images = suggested_inputs(request.options.data)
    click.echo(f"Next{where}: cloudrt-infer {images} --model {quote(str(last.path))}{option}")


def _speed_text(done: Exported) -> str:
    if done.artifact.precision == "fp32":
        return "1.00x"
    if done.speed is not None:
        return f"{done.speed:.2f}x"
    return "as fp32" if done.artifact.precision == "fp16" and done.parity.provider.startswith("cpu") else "not run"


def _show_table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
