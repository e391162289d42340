"""`cloudrt-infer`: parse, predict, say what came of it."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cloudrt.cli.infer_checks import check_keys, check_outputs, spare_inputs
from cloudrt.cli.infer_cluster import cluster_options, infer_on, refuse_options
from cloudrt.system.terminal import Failure, progress_bar, reports_errors, say_logs

if TYPE_CHECKING:
    from cloudrt.engines.plan import Plan
    from cloudrt.images.image import ImageFile
    from cloudrt.inference.pipeline import Segmenter
    from cloudrt.inference.results import Result
    from cloudrt.inference.submission import Submission
    from cloudrt.model.inferred import Inferred
    from cloudrt.search.probabilities import ProbabilityWriter


@click.command()
@click.argument("inputs", nargs=-1, required=True, type=click.Path())
@click.option(
    "-m", "--model", type=click.Path(path_type=Path), help="The artifact; ./model.onnx, else the shipped one."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="submission.csv, or as --format has it.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["csv", "parquet", "coco"]),
    default="csv",
    show_default=True,
    help="Rows for the competition's scorer, the same rows in Parquet, or a COCO data set of instances.",
)
@click.option("--overwrite", is_flag=True, help="Replace an output that exists, or the journal of an unfinished run.")
@click.option("--resume", is_flag=True, help="Go on where a run that was cut short stopped, with its options.")
@click.option(
    "--sample", type=click.Path(path_type=Path), help="sample_submission.csv: predict its images, in its order."
)
@click.option(
    "--provider",
    type=click.Choice(["auto", "tensorrt", "cuda", "openvino", "cpu"]),
    default="auto",
    show_default=True,
    help="auto measures, once for each model and machine, takes the fastest that gives the same answers, and says so.",
)
@click.option("--batch-size", type=click.IntRange(1, 65536), help="Images a batch; measured otherwise.")
@click.option(
    "--compute",
    type=click.Choice(["auto", "f32", "bf16", "f16"]),
    default="auto",
    show_default=True,
    help="What OpenVINO computes in; auto lowers fp16 and int8 artifacts where the CPU can and the answers agree.",
)
@click.option("--devices", help="GPUs, such as 0,1: an engine on each. The first one otherwise.")
@click.option("--allow-cpu", is_flag=True, help="Accept heavy nodes on the CPU although a GPU was asked for.")
@click.option(
    "--decoder",
    type=click.Choice(["cpu", "gpu"]),
    default="cpu",
    show_default=True,
    help="gpu: JPEGs by nvImageCodec, which finds files that are cut but not every damage inside.",
)
@click.option("--threads", type=click.IntRange(1, 4096), help="CPU threads of each stage; all by default.")
@click.option(
    "--max-megapixels",
    type=click.FloatRange(0, 1e6, min_open=True),
    default=100,
    show_default=True,
    help="Larger images are failures.",
)
@click.option("--report", is_flag=True, help="Write report.html beside the output.")
@click.option(
    "--report-images",
    type=click.IntRange(0, 10_000),
    default=24,
    show_default=True,
    help="Images in it, drawn at random; they get smaller as they get more.",
)
@click.option(
    "--stats", type=click.Path(path_type=Path), help="Write times, queues and memory of each stage here, JSON."
)
@click.option("--masks", type=click.Path(path_type=Path), help="Write masks here: CLASS/IMAGE.png.")
@click.option("--overlays", type=click.Path(path_type=Path), help="Write images with their masks here: IMAGE.jpg.")
@click.option(
    "--save-probabilities",
    type=click.Path(path_type=Path),
    help="Keep the network's answers in this .npz, for cloudrt tune.",
)
@cluster_options
@reports_errors
def infer(
    inputs: tuple[str, ...],
    model: Path | None,
    output: Path | None,
    form: str,
    overwrite: bool,
    resume: bool,
    sample: Path | None,
    provider: str,
    batch_size: int | None,
    compute: str,
    devices: str | None,
    allow_cpu: bool,
    decoder: str,
    threads: int | None,
    max_megapixels: float,
    report: bool,
    report_images: int,
    stats: Path | None,
    masks: Path | None,
    overlays: Path | None,
    save_probabilities: Path | None,
    cluster: str | None,
    partitions: str | None,
    partition_format: str | None,
    partition_size: int | None,
    endpoint: str | None,
) -> None:
    """Write the submission of INPUTS: folders of images, images, quoted patterns such as 'in/**/*.jpg', or lists.

    A list is a .txt file that names an image a line, relative to its own folder. One row for each image and class, on
    the artifact's submission grid. Images that cannot be decoded get empty rows, are listed in failures.csv beside the
    output, and make the exit status 1.

    A run that is cut short, by a signal or by a power cut, leaves OUTPUT.journal; the same command with --resume goes
    on from there, and ends with the same bytes as a run that was never interrupted.
    """
    from cloudrt.inference.outputs import SUFFIXES
    from cloudrt.inference.submission import journal_path

    refuse_options(click.get_current_context().params, cluster is not None)
    output = output or Path(f"submission{SUFFIXES[form]}")
    if form == "parquet":
        import pyarrow  # noqa: F401 - says what to install, before anything slow
    if resume and save_probabilities:
        raise Failure("--save-probabilities keeps those of a whole run: it cannot --resume one")
    if overwrite and resume:
        raise Failure("--resume goes on, --overwrite begins afresh: give one of them")
    if not (overwrite or resume):
        if journal_path(output).exists():
            raise Failure(f"{journal_path(output)} is of a run that was cut short: --resume it, or --overwrite")
        if output.exists():
            raise Failure(f"{output} exists: give another --output, or --overwrite")
    check_outputs(output, model, sample, report, stats, save_probabilities, masks, overlays)
    if math.isnan(max_megapixels):
        raise Failure("--max-megapixels nan is no number")
    if cluster is not None:
        from cloudrt.cluster.driver import Ask

        infer_on(
            Ask(
                inputs,
                output,
                cluster,
                model,
                sample,
                form,
                partitions,
                partition_format or "parquet",
                partition_size or 0,
                endpoint,
                provider,
                batch_size or 0,
                compute,
                threads or 0,
                int(max_megapixels * 1e6),
                allow_cpu,
                decoder,
                resume,
                overwrite,
            )
        )
        return
    from cloudrt.images.inputs import list_inputs
    from cloudrt.inference.pipeline import Segmenter

    say_logs("cloudrt", logging.INFO)
    numbers = _device_numbers(devices)
    plan = _recorded_plan(journal_path(output), provider, batch_size, compute) if resume else None
    with Segmenter(
        model,
        provider,
        batch_size=batch_size or 0,
        threads=threads or 0,
        max_pixels=int(max_megapixels * 1e6),
        compute=compute,
        devices=numbers,
        allow_cpu=allow_cpu,
        decoder=decoder,
        plan=plan,
    ) as segmenter:
        _announce(segmenter, provider)
        files = list_inputs(inputs, sample, segmenter.labels)
        spare_inputs(files, (output, stats, save_probabilities))
        if masks or overlays:
            check_keys(files)
        began = time.perf_counter()
        options = _Outputs(output, form, resume, report_images if report else None, masks, overlays, save_probabilities)
        done = _predict(segmenter, files, options, began)
        seconds = time.perf_counter() - began
        if stats:
            _write_stats(stats, segmenter, done)
    click.echo(
        f"{output}: {done.images} images, {done.rows_with_mask} masks, {done.failed} failed, "
        f"{(done.images - done.resumed) / seconds:.1f} images/s"
    )
    if done.failed:
        click.echo(f"{output.with_name('failures.csv')} lists what failed and why", err=True)
        raise SystemExit(1)


def _device_numbers(devices: str | None) -> tuple[int, ...]:
    try:
        return (0,) if devices is None else tuple(int(number) for number in devices.split(","))
    except ValueError:
        raise Failure(f"--devices {devices}: numbers of GPUs, such as 0,1") from None


def _recorded_plan(journal: Path, provider: str, batch_size: int | None, compute: str) -> Plan | None:
    """Return how the run to be resumed ran, as far as it is what is asked for now; the journal names what differs."""
    from cloudrt.engines.plan import Plan, Request
    from cloudrt.inference.journal import read_identity

    identity = read_identity(journal)
    plan = Plan.recorded(identity) if identity else None
    return plan if plan and plan.serves(Request(provider, batch_size or 0, compute=compute)) else None


def _announce(segmenter: Segmenter, wanted: str) -> None:
    artifact = segmenter.artifact
    height, width = artifact.input_size
    click.echo(
        f"{segmenter.model}: {artifact.architecture} with {artifact.encoder}, {artifact.precision}, {width}x{height}; "
        f"{segmenter.plan.describe()}, {segmenter.threads} threads",
        err=True,
    )
    if wanted == "auto":
        for name, reason in segmenter.plan.passed_over.items():
            click.echo(f"  not {name}: {reason}", err=True)


@dataclass(frozen=True)
class _Outputs:
    """Where everything goes."""

    output: Path
    form: str
    resume: bool
    report_images: int | None
    masks: Path | None
    overlays: Path | None
    probabilities: Path | None


def _predict(segmenter: Segmenter, files: list[ImageFile], to: _Outputs, began: float) -> Submission:
    from cloudrt.images.inputs import digest_keys
    from cloudrt.inference.results import Result
    from cloudrt.inference.submission import journal_path, open_submission
    from cloudrt.reports.submission_page import Report
    from cloudrt.search.probabilities import write_probabilities
    from cloudrt.system.overlap import overlap

    page = None
    if to.report_images is not None:
        page = Report(segmenter.labels, to.report_images, segmenter.max_pixels)
    identity = segmenter.identity() | {"images": len(files), "list of images and their sizes": digest_keys(files)}
    try:
        with ExitStack() as stack:
            submission = stack.enter_context(
                open_submission(to.output, segmenter.labels, identity, resume=to.resume, form=to.form)
            )
            if to.resume:
                click.echo(_resumed(submission.resumed, to.output), err=True)
                segmenter.shrink(submission.journal.size)
            left = files[submission.resumed :]
            for file, record in zip(files, submission.journal.records(), strict=False):  # of an earlier run
                rle = dict(zip(segmenter.labels.classes, record.texts, strict=True))
                if page:
                    page.add(record.key, file.path, None if record.error else rle, record.error)
                _paint(segmenter, to, (file, Result(record.key, rle, record.error, segmenter.labels)))
            keep = None
            if to.probabilities:
                keep = _keeper(stack.enter_context(write_probabilities(to.probabilities, segmenter.labels)))
            advance = stack.enter_context(progress_bar("Segmenting", len(left)))
            painters = stack.enter_context(ThreadPoolExecutor(segmenter.threads, "paint"))
            results = zip(left, segmenter.predict(left, keep), strict=True)
            for file, result in overlap(painters, partial(_paint, segmenter, to), results, 2 * segmenter.threads):
                submission.add(result.image, result.rle, result.error, result.batch, result.batch_size)
                if page:
                    page.add(result.image, file.path, None if result.error else result.rle, result.error)
                advance(failed=submission.failed, limit=segmenter.stats.limiting())
    except (KeyboardInterrupt, OSError):
        if journal_path(to.output).exists():
            click.echo(f"{journal_path(to.output)} holds what is finished; --resume goes on from there", err=True)
        raise
    if page:
        seconds = time.perf_counter() - began
        page.write(to.output.with_name("report.html"), _facts(segmenter, submission, seconds))
        click.echo(f"{to.output.with_name('report.html')}: open it in a browser")
    return submission


def _paint(segmenter: Segmenter, to: _Outputs, pair: tuple[ImageFile, Result]) -> tuple[ImageFile, Result]:
    """Write the pictures of one image, if any are wanted."""
    from cloudrt.inference.outputs import write_masks, write_overlay

    file, result = pair
    texts = list(result.rle.values())
    if to.masks:
        write_masks(to.masks, result.image, texts, segmenter.labels)
    if to.overlays and result.error is None:
        write_overlay(to.overlays, result.image, file.path, texts, segmenter.labels, segmenter.max_pixels)
    return pair


def _keeper(writer: ProbabilityWriter) -> Callable[[Inferred], None]:
    def keep(item: Inferred) -> None:
        if item.probability is not None:
            writer.add(item.image, item.probability, item.presence)

    return keep


def _write_stats(path: Path, segmenter: Segmenter, done: Submission) -> None:
    from cloudrt.system.files import replacing

    counts = {"images": done.images, "resumed": done.resumed, "failed": done.failed, "masks": done.rows_with_mask}
    values = segmenter.identity() | counts | segmenter.stats.to_dict()
    with replacing(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n")


def _resumed(done: int, output: Path) -> str:
    from cloudrt.inference.submission import journal_path

    if done:
        return f"{journal_path(output)}: {done} images are done, going on"
    return "Nothing to resume: beginning with the first image"


def _facts(segmenter: Segmenter, submission: Submission, seconds: float) -> dict[str, str]:
    artifact = segmenter.artifact
    height, width = artifact.input_size
    return {
        "Model": segmenter.model.name,
        "Network": f"{artifact.architecture} with {artifact.encoder}, {artifact.precision}, {width}x{height}",
        "Held-out Dice": f"{artifact.validation_dice:.4f}",
        "Provider": segmenter.plan.describe().removeprefix("provider "),
        "Images per second": f"{(submission.images - submission.resumed) / seconds:.1f}",
    }
