"""`cloudrt-export`: parse, export, show the parity table."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cloudrt.cli.common import Failure, progress_bar, reports_errors, say_logs
from cloudrt.cli.types import Size
from cloudrt.errors import CloudrtError, ParityError

if TYPE_CHECKING:
    from cloudrt.export.export import Exported, Source
    from cloudrt.export.parity import Tolerances, Verdict

PRECISIONS = ("fp32", "fp16", "int8")


@click.command()
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="MODEL.PTH...")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The artifact; model.onnx beside MODEL.PTH by default."
)
@click.option(
    "--precision", type=click.Choice(["fp16", "fp32", "int8", "all"]), default="fp16", show_default=True,
    help="all writes one of each, model.fp32.onnx and so on, and one table of size, parity and speed.",
)  # fmt: skip
@click.option(
    "--int8-target", type=click.Choice(["cpu", "tensorrt"]), default="cpu", show_default=True,
    help="Lay int8 out for CPUs (ONNX Runtime, OpenVINO: asymmetric) or for TensorRT (symmetric).",
)  # fmt: skip
@click.option(
    "--tta", type=click.Choice(["none", "h", "v", "hv", "flip"]), default="none", show_default=True,
    help="Average over flips of the image inside the graph: left-right, up-down, or all four (hv; flip is the same).",
)  # fmt: skip
@click.option("--input-size", type=Size(), help="Other than the checkpoint's; multiples of 32.")
@click.option(
    "--calibration", type=click.Path(path_type=Path),
    help="Folder of images to compare on, and to measure int8 ranges on; made-up scenes by default.",
)  # fmt: skip
@click.option("--images", type=click.IntRange(1), default=64, show_default=True, help="At most so many of them.")
@click.option(
    "--provider", type=click.Choice(["auto", "tensorrt", "cuda", "openvino", "cpu"]), default="auto", show_default=True,
    help="Compare in this one: the one that will run the artifact.",
)  # fmt: skip
@click.option(
    "--max-mean-difference", type=click.FloatRange(0), help="Allowed mean difference of probability, in 1/255."
)
@click.option("--min-dice", type=click.FloatRange(0, 1), help="Least Dice between the two submissions.")
@click.option("--max-empty-mismatch", type=click.FloatRange(0, 1), help="Allowed share of rows empty in one only.")
@click.option("--weights-license", default="", help="Stored in the artifact: what the weights' origin asks for.")
@click.option("--json", "figures", type=click.Path(path_type=Path), help="Write the figures here, with the machine.")
@click.option("--triton", type=click.Path(path_type=Path), help="Also write a model repository for Triton here.")
@click.option("--build-engine", is_flag=True, help="Also build TensorRT's engine now, ahead of the first inference.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=32, show_default=True,
    help="Of the TensorRT engine; the largest of Triton.",
)  # fmt: skip
@reports_errors
def export(
    checkpoints: tuple[Path, ...], output: Path | None, precision: str, int8_target: str, tta: str,
    input_size: tuple[int, int] | None, calibration: Path | None, images: int, provider: str,
    max_mean_difference: float | None, min_dice: float | None, max_empty_mismatch: float | None,
    weights_license: str, figures: Path | None, triton: Path | None, build_engine: bool, batch_size: int,
) -> None:  # fmt: skip
    """Turn MODEL.PTH into an ONNX artifact that gives the same submission, or write nothing.

    Several checkpoints become one artifact, which gives the mean of their probabilities. The artifact is compared with
    the same in PyTorch on images before it is written. Past the tolerances, the layers that must stay in fp32 are
    looked for; where none help, the command fails with status 2 and says what to try.
    """
    for checkpoint in checkpoints:
        if checkpoint.suffix == ".onnx":
            raise Failure(f"{checkpoint} is an artifact already: give the checkpoint that it was exported from")
    if precision == "all" and (triton or build_engine):
        raise Failure("--triton and --build-engine take one artifact: give one --precision")
    say_logs("cloudrt", logging.INFO)
    from cloudrt.engines import choose_provider

    if build_engine:
        choose_provider("tensorrt")  # says what to install, before anything slow
    from cloudrt.export.export import Source, judge_of

    chosen = PRECISIONS if precision == "all" else (precision,)
    judges = {one: judge_of(one, int8_target, provider) for one in chosen}
    target = output or checkpoints[0].with_name("model.onnx")
    source = Source(
        checkpoints,
        tta="hv" if tta == "flip" else tta,
        input_size=input_size,
        calibration=calibration,
        images=images,
        int8="int8" in chosen,
        weights_license=weights_license,
    )
    with progress_bar("Running PyTorch", len(source.compared.names)) as advance:
        source.run_pytorch(advance)
    given = {"mean_difference": max_mean_difference, "dice": min_dice, "empty_mismatch": max_empty_mismatch}
    limits = {name: value for name, value in given.items() if value is not None}
    if precision == "all":
        _export_all(source, target, judges, int8_target, limits, figures)
        return
    done = _export_one(source, target, precision, provider, int8_target, limits)
    if figures:
        _write_figures(figures, source, [done])
    if done.networks_per_image > 1:
        click.echo(
            f"{done.networks_per_image} networks run for each image; the rules are those of {checkpoints[0]} alone: "
            f"tune new ones on held-out images with cloudrt tune {target} DATA --images held_out.txt"
        )
    if triton:
        from cloudrt.export.triton import write_repository

        click.echo(f"{write_repository(triton, target, done.artifact, largest_batch=batch_size)}: a Triton model")
    if build_engine:
        _build_engine(target, batch_size)
    click.echo(f"Next: cloudrt-infer test_images/ --model {target}")


def _export_one(
    source: Source, target: Path, precision: str, provider: str, int8_target: str, limits: dict[str, float]
) -> Exported:
    from cloudrt.export.export import export as run

    compared = source.reference
    title = f"{precision} beside PyTorch fp32 on {len(compared.names)} {compared.source}"
    try:
        with progress_bar(f"Comparing {precision}", len(compared.names)) as advance:
            done = run(
                source, target, precision, tolerances=_tolerances(precision, limits), provider=provider,
                int8_target=int8_target, advance=advance,
            )  # fmt: skip
    except ParityError as error:
        _show(title, error.verdicts)
        raise
    _show(f"{title}, in {done.parity.provider}", done.parity.verdicts(done.tolerances))
    if not done.parity.has_rules:
        click.echo("The checkpoint has no rules, so its masks mean nothing: the probabilities alone were judged.")
    elif done.parity.worst:
        click.echo(f"Least alike: {', '.join(done.parity.worst)}")
    _say_done(done)
    return done


def _export_all(
    source: Source,
    target: Path,
    judges: dict[str, str],
    int8_target: str,
    limits: dict[str, float],
    figures: Path | None,
) -> None:
    """Export every precision that passes; fail in the end where one did not."""
    rows: list[tuple[str, ...]] = []
    refused, written = [], []
    for precision, judge in judges.items():
        path = target.with_name(f"{target.stem}.{precision}{target.suffix}")
        try:
            done = _export_one(source, path, precision, judge, int8_target, limits)
        except ParityError as error:
            click.echo(f"{precision}: {error}", err=True)
            refused.append(precision)
            rows.append((precision, "refused", *[""] * 5))
            continue
        written.append(done)
        parity, kept = done.parity, len(done.artifact.kept_fp32)
        rows.append((
            precision, f"{done.bytes / 1e6:.1f}", f"{parity.dice:.4f}" if parity.has_rules else "-",
            f"{parity.mean_difference:.3f}", f"{parity.empty_mismatch:.2%}" if parity.has_rules else "-",
            f"{kept} of {done.layers}" if done.layers else "-", _speed(done),
        ))  # fmt: skip
    columns = ("", "MB", "Dice", "difference", "empty in one", "fp32 layers", "speed")
    _table("Parity with PyTorch fp32; speed in turns with the fp32 artifact", columns, rows)
    if figures:
        _write_figures(figures, source, written)
    if refused:
        raise Failure(f"{', '.join(refused)} did not pass the gate and was not written; the others were")


def _speed(done: Exported) -> str:
    if done.artifact.precision == "fp32":
        return "1.00x"
    if done.speed is not None:
        return f"{done.speed:.2f}x"
    return "as fp32" if done.artifact.precision == "fp16" else "not run"


def _say_done(done: Exported) -> None:
    artifact = done.artifact
    click.echo(f"{done.path}: {artifact.precision}, {done.bytes / 1e6:.1f} MB")
    if artifact.kept_fp32:
        click.echo(
            f"{len(artifact.kept_fp32)} of {done.layers} layers stay in fp32, or the gate would not pass: "
            f"{', '.join(artifact.kept_fp32)}"
        )
    if done.speed is not None:
        slower = "; the fp32 or fp16 artifact is the faster one here" if done.speed < 1 else ""
        click.echo(f"{done.speed:.2f}x the speed of fp32 in {done.parity.provider} on this machine{slower}")


def _write_figures(path: Path, source: Source, written: list[Exported]) -> None:
    """Write what was measured, on which machine, by which versions; names no file, folder or user."""
    from dataclasses import asdict

    from cloudrt.doctor import describe_machine
    from cloudrt.files import replacing

    members = source.ensemble.checkpoints
    values = {
        "machine": asdict(describe_machine()),
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


def _build_engine(target: Path, batch_size: int) -> None:
    """Open the artifact in TensorRT once, which builds its engine and leaves it in the user's cache."""
    from time import perf_counter

    from cloudrt.engines import open_engine

    click.echo("Building TensorRT's engine: minutes, once", err=True)
    begin = perf_counter()
    try:
        open_engine(target, "tensorrt", batch_size).close()
    except CloudrtError as error:
        raise Failure(f"{target} was written, but its TensorRT engine was not built: {error}") from error
    click.echo(f"The engine for batches of {batch_size} was built in {perf_counter() - begin:.0f} s")


def _tolerances(precision: str, limits: dict[str, float]) -> Tolerances:
    from cloudrt.export.parity import TOLERANCES

    return replace(TOLERANCES[precision], **limits)


def _show(title: str, verdicts: tuple[Verdict, ...] | list[Verdict]) -> None:
    signs = {True: "passed", False: "FAILED", None: ""}
    rows = [(one.figure, one.found, one.allowed, signs[one.passed]) for one in verdicts]
    _table(title, ("figure", "found", "allowed", ""), rows)


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
