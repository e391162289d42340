"""`cloudrt-infer`: parse, predict, say what came of it."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cloudrt.cli.common import Failure, progress_bar, reports_errors

if TYPE_CHECKING:
    from cloudrt.images import ImageFile
    from cloudrt.pipeline import Segmenter
    from cloudrt.submission import Submission


@click.command()
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-m", "--model", type=click.Path(path_type=Path), help="The artifact; ./model.onnx, else the shipped one."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("submission.csv"), show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
@click.option(
    "--sample", type=click.Path(path_type=Path), help="sample_submission.csv: predict its images, in its order."
)
@click.option(
    "--provider", type=click.Choice(["auto", "tensorrt", "cuda", "openvino", "cpu"]), default="auto", show_default=True,
    help="auto takes the fastest that works here, and says which.",
)  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), help="Images a batch; the provider's default otherwise.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of each stage; all that may be used by default.")
@click.option(
    "--max-megapixels",
    type=click.FloatRange(0, 1e6, min_open=True),
    default=100,
    show_default=True,
    help="Larger images are failures.",
)
@click.option("--report", is_flag=True, help="Write report.html beside the output.")
@reports_errors
def infer(
    inputs: tuple[Path, ...], model: Path | None, output: Path, overwrite: bool, sample: Path | None, provider: str,
    batch_size: int | None, threads: int | None, max_megapixels: float, report: bool,
) -> None:  # fmt: skip
    """Write the submission of INPUTS, folders of images or images.

    One row for each image and class, on the artifact's submission grid. Images that cannot be decoded get empty rows,
    are listed in failures.csv beside the output, and make the exit status 1.
    """
    if output.exists() and not output.is_file():
        raise Failure(f"{output} is not a regular file: give the name of a file to write")
    if output.exists() and not overwrite:
        raise Failure(f"{output} exists: give another --output, or --overwrite")
    if report and output.name == "report.html":
        raise Failure(f"{output} would be replaced by the report: give another --output")
    if math.isnan(max_megapixels):
        raise Failure("--max-megapixels nan is no number")
    for path in inputs:
        if not path.exists():
            raise Failure(f"{path} is missing: give a folder of images")
    from cloudrt.pipeline import Segmenter
    from cloudrt.submission import list_inputs

    with Segmenter(
        model, provider, batch_size=batch_size or 0, threads=threads or 0, max_pixels=int(max_megapixels * 1e6)
    ) as segmenter:
        _announce(segmenter, provider)
        files = list_inputs(inputs, sample, segmenter.labels)
        began = time.perf_counter()
        done = _predict(segmenter, files, output, report, began)
        seconds = time.perf_counter() - began
    click.echo(
        f"{output}: {done.images} images, {done.rows_with_mask} masks, {done.failed} failed, "
        f"{done.images / seconds:.1f} images/s"
    )
    if done.failed:
        click.echo(f"{output.with_name('failures.csv')} lists what failed and why", err=True)
        raise SystemExit(1)


def _announce(segmenter: Segmenter, wanted: str) -> None:
    artifact = segmenter.artifact
    height, width = artifact.input_size
    click.echo(
        f"{segmenter.model}: {artifact.architecture} with {artifact.encoder}, {artifact.precision}, {width}x{height}; "
        f"provider {segmenter.choice.provider}, batch {segmenter.batch_size}, {segmenter.threads} threads",
        err=True,
    )
    if wanted == "auto":
        for name, reason in segmenter.choice.passed_over.items():
            click.echo(f"  not {name}: {reason}", err=True)


def _predict(segmenter: Segmenter, files: list[ImageFile], output: Path, report: bool, began: float) -> Submission:
    from cloudrt.report import Report
    from cloudrt.submission import open_submission

    page = Report(segmenter.labels, max_pixels=segmenter.max_pixels) if report else None
    with open_submission(output) as submission, progress_bar("Segmenting", len(files)) as advance:
        for file, result in zip(files, segmenter.predict(files), strict=True):
            submission.add(result.image, result.rle, result.error)
            if page:
                page.add(result.image, file.path, None if result.error else result.rle, result.error)
            advance(failed=submission.failed)
    if page:
        seconds = time.perf_counter() - began
        page.write(output.with_name("report.html"), _facts(segmenter, submission, seconds))
        click.echo(f"{output.with_name('report.html')}: open it in a browser")
    return submission


def _facts(segmenter: Segmenter, submission: Submission, seconds: float) -> dict[str, str]:
    artifact = segmenter.artifact
    height, width = artifact.input_size
    return {
        "Model": segmenter.model.name,
        "Network": f"{artifact.architecture} with {artifact.encoder}, {artifact.precision}, {width}x{height}",
        "Held-out Dice": f"{artifact.validation_dice:.4f}",
        "Provider": segmenter.choice.provider,
        "Images per second": f"{submission.images / seconds:.1f}",
    }
