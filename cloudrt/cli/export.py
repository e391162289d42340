"""`cloudrt-export`: parse, export, print the parity tables."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from cloudrt.cli.types import FILE, Size
from cloudrt.options import PROVIDERS
from cloudrt.system.progress import progress_bar
from cloudrt.system.terminal import Failure, log_to_stderr, reports_errors

logger = logging.getLogger(__name__)


@click.command()
@click.argument("checkpoints", nargs=-1, required=True, type=FILE, metavar="MODEL.PTH...")
@click.option("-o", "--output", type=FILE, help="The artifact. Default: model.onnx beside MODEL.PTH.")
@click.option("--overwrite", is_flag=True, help="Replace outputs that exist.")
@click.option(
    "--precision",
    type=click.Choice(["fp16", "fp32", "int8", "all"]),
    default="fp16",
    show_default=True,
    help="all: one artifact for each precision (model.fp32.onnx and so on), and a table of size, parity and speed.",
)
@click.option(
    "--int8-target",
    type=click.Choice(["cpu", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="Quantisation of int8 layers: asymmetric for CPUs (ONNX Runtime, OpenVINO) or symmetric for TensorRT.",
)
@click.option(
    "--tta",
    type=click.Choice(["none", "h", "v", "hv"]),
    default="none",
    show_default=True,
    help="Test-time augmentation in the graph: mean over the image and its horizontal flip (h), its vertical flip (v), "
    "or all four combinations (hv).",
)
@click.option("--input-size", type=Size(), help="WIDTHxHEIGHT, multiples of 32. Default: the checkpoint's.")
@click.option(
    "--data",
    type=FILE,
    metavar="FOLDER",
    help="Images for the parity gate and for int8 calibration. Default: synthetic images.",
)
@click.option(
    "--max-images",
    type=click.IntRange(1, 100_000),
    default=64,
    show_default=True,
    help="Maximum number of images to compare, and of further images for int8 calibration.",
)
@click.option(
    "--provider",
    type=click.Choice(PROVIDERS),
    default="auto",
    show_default=True,
    help="Provider that runs the comparison. auto: CUDA if it works here, else the CPU; for int8 the CPU, or TensorRT "
    "if that is the target and works here.",
)
@click.option(
    "--max-mean-difference",
    type=click.FloatRange(0),
    help="Maximum mean difference of the probability, in levels of 1/255. Default: 0.05 fp32, 0.5 fp16, 4 int8.",
)
@click.option(
    "--min-dice",
    type=click.FloatRange(0, 1),
    help="Minimum Dice between the two submissions. Default: 0.995 fp32, 0.995 fp16, 0.98 int8.",
)
@click.option(
    "--max-empty-mismatch",
    type=click.FloatRange(0, 1),
    help="Maximum share of rows that are empty in one submission only. Default: 0.005. With --precision all, "
    "these three options do not loosen the limits of fp32 and fp16.",
)
@click.option("--weights-license", default="", help="Licence to store in the artifact. Default: the checkpoint's.")
@click.option(
    "--stats",
    "figures",
    type=FILE,
    help="Write the measured figures, the machine and the versions to this JSON file.",
)
@click.option("--triton", type=FILE, help="Also write a Triton model repository to this folder.")
@click.option("--build-engine", is_flag=True, help="Also build TensorRT's engine, before the first inference needs it.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Batch size of TensorRT's engines, and maximum batch size of Triton.",
)
@click.option(
    "--check",
    type=click.Choice(["tensorrt"]),
    help="Build TensorRT engines for three GPU generations, without a GPU. Give artifacts (.onnx) to do only this.",
)
@reports_errors
def export(
    checkpoints: tuple[Path, ...],
    output: Path | None,
    overwrite: bool,
    precision: str,
    int8_target: str,
    tta: str,
    input_size: tuple[int, int] | None,
    data: Path | None,
    max_images: int,
    provider: str,
    max_mean_difference: float | None,
    min_dice: float | None,
    max_empty_mismatch: float | None,
    weights_license: str,
    figures: Path | None,
    triton: Path | None,
    build_engine: bool,
    batch_size: int,
    check: str | None,
) -> None:
    """Convert MODEL.PTH to an ONNX artifact that gives the same submission within limits, or write nothing.

    Several checkpoints become one artifact that averages their probabilities. Before it is written, the artifact is
    compared with PyTorch on images. If it exceeds the limits, the command searches for the layers that must stay in
    fp32. If no choice of layers passes, it fails with status 2 and says what to try.
    """
    log_to_stderr("cloudrt", logging.INFO)
    logger.info("Loading PyTorch ...")
    from cloudrt.cli.export_report import show_all, show_checks, show_next, show_refusals, show_result

    if check and all(path.suffix == ".onnx" for path in checkpoints):
        from cloudrt.export.run import check_artifacts

        show_checks(check_artifacts(checkpoints, batch_size))
        return
    from cloudrt.export.request import ExportRequest
    from cloudrt.export.run import run_export
    from cloudrt.export.source import SourceOptions

    limits = {"mean_difference": max_mean_difference, "dice": min_dice, "empty_mismatch": max_empty_mismatch}
    request = ExportRequest(
        checkpoints=checkpoints,
        output=output,
        precision=precision,
        int8_target=int8_target,
        provider=provider,
        limits={name: value for name, value in limits.items() if value is not None},
        options=SourceOptions(
            tta=tta,
            input_size=input_size,
            data=data,
            max_images=max_images,
            weights_license=weights_license,
        ),
        figures=figures,
        triton=triton,
        build_engine=build_engine,
        batch_size=batch_size,
        check=check or "",
        overwrite=overwrite,
    )
    done = run_export(request, progress_bar, show_result)
    if precision == "all":
        show_all(done)
    if done.written:
        show_next(request, done)
    if done.refused:
        raise Failure(f"refused by the gate and not written: {', '.join(done.refused)}")
    if check:
        show_refusals(done)
