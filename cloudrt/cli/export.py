"""`cloudrt-export`: parse, export, show the parity table."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import click

from cloudrt.cli.common import Failure, progress_bar, reports_errors, say_logs


@click.command()
@click.argument("checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="MODEL.PTH...")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The artifact; model.onnx beside MODEL.PTH by default."
)
@click.option("--precision", type=click.Choice(["fp16", "fp32"]), default="fp16", show_default=True)
@click.option(
    "--tta", type=click.Choice(["none", "h", "v", "hv", "flip"]), default="none", show_default=True,
    help="Average over flips of the image inside the graph: left-right, up-down, or all four (hv; flip is the same).",
)  # fmt: skip
@click.option(
    "--calibration", type=click.Path(path_type=Path), help="Folder of images to compare on; made-up scenes by default."
)
@click.option("--images", type=click.IntRange(1), default=64, show_default=True, help="At most so many of them.")
@click.option("--max-mean-difference", type=float, help="Allowed mean difference of probability, in levels of 1/255.")
@click.option("--min-dice", type=float, help="Least Dice between the two submissions.")
@click.option("--max-empty-mismatch", type=float, help="Allowed share of rows empty in one submission only.")
@click.option("--weights-license", default="", help="Stored in the artifact: what the weights' origin asks for.")
@reports_errors
def export(
    checkpoints: tuple[Path, ...], output: Path | None, precision: str, tta: str, calibration: Path | None, images: int,
    max_mean_difference: float | None, min_dice: float | None, max_empty_mismatch: float | None,
    weights_license: str,
) -> None:  # fmt: skip
    """Turn MODEL.PTH into an ONNX artifact that gives the same submission, or write nothing.

    Several checkpoints become one artifact, which gives the mean of their probabilities. The artifact is compared with
    the same in PyTorch on images before it is written; past the tolerances the command fails with status 2.
    """
    for checkpoint in checkpoints:
        if not checkpoint.is_file():
            raise Failure(f"{checkpoint} is missing: train one with cloudrt-train")
    say_logs("cloudrt", logging.WARNING)
    from cloudrt.export.export import SCENES
    from cloudrt.export.export import export as run
    from cloudrt.export.parity import TOLERANCES
    from cloudrt.images import find_images

    given = {"mean_difference": max_mean_difference, "dice": min_dice, "empty_mismatch": max_empty_mismatch}
    tolerances = replace(TOLERANCES[precision], **{name: value for name, value in given.items() if value is not None})
    target = output or checkpoints[0].with_name("model.onnx")
    total = min(images, len(find_images(calibration))) if calibration else SCENES
    with progress_bar("Comparing with PyTorch", total) as advance:
        done = run(
            checkpoints,
            target,
            precision,
            tta="hv" if tta == "flip" else tta,
            calibration=calibration,
            images=images,
            tolerances=tolerances,
            weights_license=weights_license,
            advance=advance,
        )
    _show(done.parity, done.tolerances)
    click.echo(f"{target}: {precision}, {done.bytes / 1e6:.1f} MB")
    if done.networks_per_image > 1:
        click.echo(
            f"{done.networks_per_image} networks run for each image; the rules are those of {checkpoints[0]} alone: "
            f"tune new ones on held-out images with cloudrt tune {target} DATA --images held_out.txt"
        )
    click.echo(f"Next: cloudrt-infer test_images/ --model {target}")


def _show(parity: object, tolerances: object) -> None:
    from rich.console import Console
    from rich.table import Table

    from cloudrt.export.parity import Parity, Tolerances

    assert isinstance(parity, Parity)
    assert isinstance(tolerances, Tolerances)
    table = Table(title=f"Parity with PyTorch fp32 on {parity.images} {parity.source}")
    for column in ("figure", "found", "allowed"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    rows = (
        ("mean difference, levels of 1/255", f"{parity.mean_difference:.4f}", f"{tolerances.mean_difference:g}"),
        ("largest difference, levels of 1/255", str(parity.max_difference), ""),
        ("pixels across their threshold", f"{parity.flipped:.4%}", ""),
        ("Dice between the submissions", f"{parity.dice:.5f}", f"at least {tolerances.dice:g}"),
        ("rows empty in one only", f"{parity.empty_mismatch:.2%}", f"{tolerances.empty_mismatch:.2%}"),
    )
    for row in rows:
        table.add_row(*row)
    Console().print(table)
