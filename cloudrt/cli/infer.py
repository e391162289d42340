"""`cloudrt-infer`: parse, run, print."""

from __future__ import annotations

import logging
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from cloudrt.cli.infer_cluster import CLUSTER_ONLY, cluster_options, infer_on, refuse_options
from cloudrt.cli.infer_remote import remote_options, take_remote_options
from cloudrt.cli.run_options import run_options, take_run_options
from cloudrt.cli.types import FILE
from cloudrt.system.progress import no_progress, progress_bar
from cloudrt.system.terminal import Failure, log_to_stderr, printable, reports_errors

if TYPE_CHECKING:
    from cloudrt.inference.task import RunSummary


@click.command()
@click.argument("inputs", nargs=-1, required=True, type=click.Path())
@click.option("-m", "--model", type=FILE, help="The artifact. Default: ./model.onnx, else the shipped one.")
@remote_options
@click.option(
    "-o",
    "--output",
    type=FILE,
    help="The submission: .csv, .parquet, .json (COCO), .geojson, .geoparquet or .zarr; - writes CSV to standard "
    "output. Default: submission.csv, or submission with the suffix of --format.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["csv", "parquet", "coco", "geojson", "geoparquet", "zarr"]),
    help="Format of the submission. Default: follows the suffix. geojson, geoparquet and zarr have positions "
    "and imply --tile.",
)
@click.option("--overwrite", is_flag=True, help="Replace outputs that exist, and the journal of an unfinished run.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run; needs the same options.")
@click.option("--sample", type=FILE, help="A sample_submission.csv: predict only its images, in its order.")
@run_options
@click.option("--report", is_flag=True, help="Write an HTML report beside the output.")
@click.option(
    "--report-images",
    type=click.IntRange(0, 10_000),
    default=24,
    show_default=True,
    help="Number of random images in the report.",
)
@click.option("--stats", type=FILE, help="Write times and queues of each stage, and memory, to this JSON file.")
@click.option("--masks", type=FILE, help="Write masks to this folder: PNG, or GeoTIFF if the position is known.")
@click.option("--overlays", type=FILE, help="Write images with their masks to this folder: IMAGE.jpg.")
@click.option("--save-probabilities", type=FILE, help="Store the network's outputs in this .npz, for cloudrt tune.")
@click.option("--tile", is_flag=True, help="Cut images larger than the model's field of view into tiles.")
@click.option("--overlap", type=click.FloatRange(0, 0.9), help="Overlap of tiles, as a fraction. Default: 0.125.")
@click.option(
    "--bounds",
    metavar="LON1,LAT1,LON2,LAT2",
    help="Bounds, in degrees, of images without GeoTIFF tags and without a world file.",
)
@click.option(
    "--simplify",
    type=click.FloatRange(0),
    help="Pixels by which the outlines of geojson and geoparquet may deviate. Default: 0.5.",
)
@click.option("-v", "--verbose", is_flag=True, help="Also print why other providers were not chosen.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@cluster_options
@reports_errors
def infer(
    inputs: tuple[str, ...], output: Path | None, form: str | None, verbose: bool, quiet: bool, **given: Any
) -> None:
    """Segment INPUTS and write a submission.

    INPUTS are folders, images, quoted patterns such as 'in/**/*.jpg', or lists: .txt files with one image per line,
    relative to the folder of the list. The submission has one row per image and class, on the artifact's submission
    grid. If images cannot be decoded, their rows are empty, submission.failures.csv (named after the output) lists
    them, and the exit status is 1.

    A run that is interrupted, by a signal or a power failure, leaves a journal beside the output. The same command with
    --resume continues it, and writes the same bytes as a run without interruption.
    """
    from cloudrt.inference.outputs import SUFFIXES
    from cloudrt.inference.run import run_task
    from cloudrt.inference.task import InferTask

    refuse_options(given, given["cluster"] is not None)
    log_to_stderr("cloudrt", logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)
    cluster = {name: given.pop(name) for name in ("cluster", *CLUSTER_ONLY)}
    run = take_remote_options(given, cluster["cluster"] is not None, take_run_options(given))
    if given["bounds"] is not None:
        from cloudrt.geo.bounds import parse_bounds

        given["bounds"] = parse_bounds(given["bounds"])
    with ExitStack() as stack:
        printed = output == Path("-")
        if printed:
            if form not in (None, "csv") or given["resume"] or given["report"] or cluster["cluster"] is not None:
                raise Failure(
                    "--output - writes CSV to standard output: it does not work with another --format, --resume, "
                    "--report or --cluster"
                )
            if sys.stdout is None:
                raise Failure("--output - writes to standard output, which is closed")
            output = Path(stack.enter_context(TemporaryDirectory())) / "submission.csv"
        output = output or Path(f"submission{SUFFIXES[form or 'csv']}")
        task = InferTask(tuple(inputs), output, format=form or "", run=run, **given)
        if cluster["cluster"] is not None:
            infer_on(task, cluster, quiet)
            return
        done = run_task(task, no_progress if quiet else progress_bar, resumable=not printed)
        if printed:
            with output.open(encoding="utf-8", newline="") as rows:
                shutil.copyfileobj(rows, sys.stdout)
        _show(done, quiet, printed)


def _show(done: RunSummary, quiet: bool, printed: bool) -> None:
    if not done.already_finished and not quiet:
        where = "standard output" if printed else done.output
        click.echo(
            f"{where}: {done.images} images, {done.rows_with_mask} masks, {done.failed} failed, "
            f"{done.images_per_second:.1f} images/s",
            err=printed,
        )
        if done.report:
            click.echo(f"{done.report}: open it in a browser", err=printed)
    if done.failures:
        if printed:
            click.echo(printable(done.failures.read_text(encoding="utf-8")), err=True, nl=False)
        else:
            if done.failed == done.images:
                click.echo(printable(f"No image could be segmented; the first {done.first_error}"), err=True)
            click.echo(f"{done.failures} lists the failed images and the reasons", err=True)
        raise SystemExit(1)
