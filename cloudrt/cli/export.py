"""`cloudrt-export`: parse, export, show the parity table."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cloudrt.cli.export_report import say_done, show_table, show_verdicts, speed_text, write_figures
from cloudrt.cli.types import Size
from cloudrt.errors import CloudrtError, ParityError
from cloudrt.system.terminal import Failure, progress_bar, reports_errors, say_logs

if TYPE_CHECKING:
    from cloudrt.export.export import Exported, Source
    from cloudrt.model.parity import Tolerances

PRECISIONS = ("fp32", "fp16", "int8")


@click.command()
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="MODEL.PTH...")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The artifact; model.onnx beside MODEL.PTH by default."
)
@click.option(
    "--precision",
    type=click.Choice(["fp16", "fp32", "int8", "all"]),
    default="fp16",
    show_default=True,
    help="all writes one of each, model.fp32.onnx and so on, and one table of size, parity and speed.",
)
@click.option(
    "--int8-target",
    type=click.Choice(["cpu", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="Lay int8 out for CPUs (ONNX Runtime, OpenVINO: asymmetric) or for TensorRT (symmetric).",
)
@click.option(
    "--tta",
    type=click.Choice(["none", "h", "v", "hv", "flip"]),
    default="none",
    show_default=True,
    help="Average over flips of the image inside the graph: left-right, up-down, or all four (hv; flip is the same).",
)
@click.option("--input-size", type=Size(), help="Other than the checkpoint's; multiples of 32.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Folder of images to compare on, and to measure int8 ranges on; made-up scenes by default.",
)
@click.option(
    "--images",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="At most so many are compared, and as many others calibrate int8.",
)
@click.option(
    "--provider",
    type=click.Choice(["auto", "tensorrt", "cuda", "openvino", "cpu"]),
    default="auto",
    show_default=True,
    help="Compare in this one, which will run the artifact. auto: CUDA where it works, else the CPU; for int8 the CPU.",
)
@click.option(
    "--max-mean-difference",
    type=click.FloatRange(0),
    help="Allowed mean difference of probability, in 1/255: 0.05 for fp32, 0.5 for fp16, 4 for int8.",
)
@click.option(
    "--min-dice",
    type=click.FloatRange(0, 1),
    help="Least Dice between the two submissions: 0.999 for fp32, 0.995 for fp16, 0.98 for int8.",
)
@click.option(
    "--max-empty-mismatch",
    type=click.FloatRange(0, 1),
    help="Allowed share of rows empty in one submission only: 0.005. With all, limits never loosen fp32 and fp16.",
)
@click.option("--weights-license", default="", help="Stored in the artifact: what the weights' origin asks for.")
@click.option(
    "--json", "figures", type=click.Path(path_type=Path), help="Write the figures, machine and versions here."
)
@click.option("--triton", type=click.Path(path_type=Path), help="Also write a model repository for Triton here.")
@click.option("--build-engine", is_flag=True, help="Also build TensorRT's engine now, ahead of the first inference.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Of the TensorRT engine; the largest of Triton.",
)
@reports_errors
def export(
    checkpoints: tuple[Path, ...],
    output: Path | None,
    precision: str,
    int8_target: str,
    tta: str,
    input_size: tuple[int, int] | None,
    calibration: Path | None,
    images: int,
    provider: str,
    max_mean_difference: float | None,
    min_dice: float | None,
    max_empty_mismatch: float | None,
    weights_license: str,
    figures: Path | None,
    triton: Path | None,
    build_engine: bool,
    batch_size: int,
) -> None:
    """Turn MODEL.PTH into an ONNX artifact that gives the same submission, or write nothing.

    Several checkpoints become one artifact, which gives the mean of their probabilities. The artifact is compared with
    the same in PyTorch on images before it is written. Past the tolerances, the layers that must stay in fp32 are
    looked for; where none help, the command fails with status 2 and says what to try.
    """
    for checkpoint in checkpoints:
        if checkpoint.suffix == ".onnx":
            raise Failure(f"{checkpoint} is an artifact already: give the checkpoint that it was exported from")
    given = {"mean_difference": max_mean_difference, "dice": min_dice, "empty_mismatch": max_empty_mismatch}
    limits = {name: value for name, value in given.items() if value is not None}
    if any(math.isnan(value) for value in limits.values()):
        raise Failure("nan is no limit: give a number")
    chosen = PRECISIONS if precision == "all" else (precision,)
    target = output or checkpoints[0].with_name("model.onnx")
    targets = {one: _with_precision(target, one) if precision == "all" else target for one in chosen}
    _check_outputs(checkpoints, [*targets.values(), *([figures] if figures else [])], triton)
    if precision == "all" and (triton or build_engine):
        raise Failure("--triton and --build-engine take one artifact: give one --precision")
    say_logs("cloudrt", logging.INFO)
    from cloudrt.engines.choice import choose_provider

    if build_engine:
        choose_provider("tensorrt")  # says what to install, before anything slow
    from cloudrt.export.export import Source, judge_of

    judges = {one: judge_of(one, int8_target, provider) for one in chosen}
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
    if precision == "all":
        _export_all(source, targets, judges, int8_target, limits, figures)
        return
    done = _export_one(source, target, precision, judges[precision], int8_target, _tolerances(precision, limits))
    if figures:
        write_figures(figures, source, [done])
    if done.networks_per_image > 1:
        whose = f"those of {checkpoints[0]} alone: tune new ones on held-out images with cloudrt tune {target} DATA"
        if len(checkpoints) > 1 and len({one.rules for one in source.ensemble.checkpoints}) == 1:
            whose = "the ones that all members share"
        click.echo(f"{done.networks_per_image} networks run for each image; the rules are {whose}")
    if triton:
        from cloudrt.export.triton import write_repository

        replaced = ", in the place of the one that was there" if (triton / "cloudrt").exists() else ""
        root = write_repository(triton, target, done.artifact, largest_batch=batch_size)
        click.echo(f"{root}: a Triton model{replaced}")
    if build_engine:
        _build_engine(target, batch_size)
    elsewhere = done.artifact.int8_target == "tensorrt" and done.parity.provider != "tensorrt"
    there = ("Next, where TensorRT is installed", " --provider tensorrt") if elsewhere else ("Next", "")
    click.echo(f"{there[0]}: cloudrt-infer test_images/ --model {target}{there[1]}")


def _with_precision(path: Path, precision: str) -> Path:
    """model.onnx -> model.fp16.onnx."""
    return path.with_name(f"{path.stem}.{precision}{path.suffix}")


def _check_outputs(checkpoints: tuple[Path, ...], outputs: list[Path], triton: Path | None) -> None:
    """Refuse, before anything slow, to write where the work would be lost or a checkpoint destroyed."""
    taken = {os.path.realpath(path): path for path in checkpoints}
    for path in outputs:
        real = os.path.realpath(path)
        if real in taken:
            raise Failure(f"{path} would replace {taken[real]}: give another --output or --json")
        taken[real] = path
        if path.exists() and not path.is_file():
            raise Failure(f"{path} is not a regular file: give the name of a file to write")
    for folder in [Path(os.path.realpath(path)).parent for path in outputs] + ([triton] if triton else []):
        there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise Failure(
                f"{folder} cannot be written to: {there} is {'no folder' if there.is_file() else 'protected'}"
            )


def _export_one(
    source: Source, target: Path, precision: str, provider: str, int8_target: str, tolerances: Tolerances
) -> Exported:
    from cloudrt.export.export import export as run

    compared = source.reference
    title = f"{precision} beside PyTorch fp32 on {len(compared.images)} {compared.answers.source}"
    try:
        with progress_bar(f"Comparing {precision}", len(compared.images)) as advance:
            done = run(
                source,
                target,
                precision,
                tolerances=tolerances,
                provider=provider,
                int8_target=int8_target,
                advance=advance,
            )
    except ParityError as error:
        show_verdicts(title, error.verdicts)
        raise
    show_verdicts(f"{title}, in {done.parity.provider}", done.parity.verdicts(done.tolerances))
    if not done.parity.has_rules:
        click.echo("The checkpoint has no rules, so its masks mean nothing: the probabilities alone were judged.")
    elif done.parity.worst:
        click.echo(f"Least alike: {', '.join(done.parity.worst)}")
    say_done(done)
    return done


def _export_all(
    source: Source,
    targets: dict[str, Path],
    judges: dict[str, str],
    int8_target: str,
    limits: dict[str, float],
    figures: Path | None,
) -> None:
    """Export every precision that passes; fail in the end where one did not."""
    rows: list[tuple[str, ...]] = []
    refused, written = [], []
    for precision, judge in judges.items():
        tolerances = _tolerances(precision, limits, tighten=precision != "int8")
        try:
            done = _export_one(source, targets[precision], precision, judge, int8_target, tolerances)
        except ParityError as error:
            click.echo(f"{precision}: {error}", err=True)
            refused.append(precision)
            rows.append((precision, "refused", *[""] * 5))
            continue
        written.append(done)
        parity, kept = done.parity, len(done.artifact.kept_fp32)
        rows.append(
            (
                precision,
                f"{done.bytes / 1e6:.1f}",
                f"{parity.dice:.4f}" if parity.has_rules else "-",
                f"{parity.mean_difference:.3f}",
                f"{parity.empty_mismatch:.2%}" if parity.has_rules else "-",
                f"{kept} of {done.layers}" if done.layers else "-",
                speed_text(done),
            )
        )
    columns = ("", "MB", "Dice", "difference", "empty in one", "fp32 layers", "speed")
    show_table("Parity with PyTorch fp32; speed in turns with the fp32 artifact", columns, rows)
    if figures:
        write_figures(figures, source, written)
    if written:
        click.echo(f"Next: cloudrt-infer test_images/ --model {written[-1].path}")
    if refused:
        raise Failure(f"{', '.join(refused)} did not pass the gate and was not written; the others were")


def _build_engine(target: Path, batch_size: int) -> None:
    """Open the artifact in TensorRT once, which builds its engine and leaves it in the user's cache."""
    from time import perf_counter

    from cloudrt.engines.choice import open_engine

    click.echo("Building TensorRT's engine: minutes, once", err=True)
    begin = perf_counter()
    try:
        open_engine(target, "tensorrt", batch_size).close()
    except CloudrtError as error:
        raise Failure(f"{target} was written, but its TensorRT engine was not built: {error}") from error
    click.echo(f"The engine for batches of {batch_size} was built in {perf_counter() - begin:.0f} s")


def _tolerances(precision: str, limits: dict[str, float], *, tighten: bool = False) -> Tolerances:
    """Return a precision's tolerances with the limits that were given; to `tighten` is to pass over wider ones."""
    from cloudrt.model.parity import TOLERANCES

    default = TOLERANCES[precision]
    if tighten:
        stricter = {"dice": max}
        limits = {name: stricter.get(name, min)(value, getattr(default, name)) for name, value in limits.items()}
    return replace(default, **limits)
