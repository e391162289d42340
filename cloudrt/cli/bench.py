"""`cloudrt-bench`: parse, measure, print the tables."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import click

from cloudrt.bench.options import PARTS, BenchOptions
from cloudrt.cli.run_options import run_options, take_run_options
from cloudrt.cli.types import FILE
from cloudrt.system.paths import check_outputs, check_suffixes
from cloudrt.system.progress import progress_bar
from cloudrt.system.terminal import Failure, reports_errors


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...", type=FILE)
@click.option("--data", type=FILE, metavar="FOLDER", help="Images to measure with. Default: synthetic images.")
@click.option(
    "--truth",
    type=FILE,
    metavar="CSV",
    help="Labels of the images in --data, such as train.csv: accuracy is then the competition's Dice.",
)
@click.option(
    "--max-images",
    type=click.IntRange(1),
    help="Maximum number of images. Default: 6, or more to fill whole batches.",
)
@run_options
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    type=FILE,
    help="The best.pth of MODEL, with which the notebook's pipeline runs in PyTorch; once for each network of MODEL.",
)
@click.option(
    "--baseline",
    type=FILE,
    help="The fp32 artifact of MODEL, for plain ONNX Runtime and OpenVINO. Default: MODEL.",
)
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Number of timed passes.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(PARTS),
    help="Part to measure; can be repeated. Default: all except host (the pipeline without a network) and scaling "
    "(runs of up to 10,000 images).",
)
@click.option(
    "-o",
    "--output",
    type=FILE,
    help="JSON file for all figures; an HTML page is written under the same name. Default: the first of bench.json, "
    "bench-2.json and so on for which neither file exists; with --overwrite, bench.json.",
)
@click.option("--overwrite", is_flag=True, help="Replace outputs that exist.")
@click.option(
    "--compare",
    "before",
    type=FILE,
    metavar="JSON",
    help="An earlier output: show the ratios that changed by more than the noise; the exit status is 1 if one fell.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Relative change of a ratio that --compare accepts.",
)
@reports_errors
def bench(
    models: tuple[Path, ...],
    data: Path | None,
    truth: Path | None,
    max_images: int | None,
    checkpoints: tuple[Path, ...],
    baseline: Path | None,
    repeat: int,
    only: tuple[str, ...],
    output: Path | None,
    overwrite: bool,
    before: Path | None,
    tolerance: float,
    **run_settings: Any,
) -> None:
    """Measure the speed of MODEL on this machine, and compare it with peers in the same run: each stage, the pipeline
    from files to CSV, and what limits it.

    Further parts: throughput by batch size and threads; rate and Dice of every MODEL in every provider; post-processing
    compared with OpenCV, scipy, cc3d and pycocotools; the search of rules compared with nested loops; latency;
    start-up. Peers that are not installed are skipped and named.

    MODEL is ./model.onnx by default, else the model that ships with the package. If several are given, accuracy
    compares all of them, and the other parts measure the first. Peers are timed only if their results agree with those
    of cloudrt. --threads also applies to the peers.
    """
    from cloudrt.bench.bench_page import write_bench_page
    from cloudrt.bench.compare import compare, read_bench
    from cloudrt.bench.measure import bench as run
    from cloudrt.cli.bench_tables import show, show_comparison
    from cloudrt.model.artifact import default_model

    if math.isnan(tolerance):
        raise Failure("--tolerance nan is not a number")
    output = output or (Path("bench.json") if overwrite else _free_name())
    check_suffixes({"--output": output}, ".json")
    page = output.with_suffix(".html")
    reads: dict[str, Path | None] = {f"MODEL {number}": path for number, path in enumerate(models, 1)}
    reads |= {f"--checkpoint {number}": path for number, path in enumerate(checkpoints, 1)}
    reads |= {"--truth": truth, "--baseline": baseline, "--compare": before, "--data": data}
    reads |= {} if models else {"the model": default_model()}
    check_outputs({"--output": output, "the page of --output": page}, reads, images=_images(data), overwrite=overwrite)
    options = BenchOptions(
        models=tuple(dict.fromkeys(models)),
        data=data,
        truth=truth,
        max_images=max_images or 0,
        run=take_run_options(run_settings),
        checkpoints=checkpoints,
        baseline=baseline,
        repeat=repeat,
        only=only,
    )
    earlier = read_bench(before) if before else None
    done = run(options, output, progress_bar)
    show(done)
    write_bench_page(done.to_dict(), page)
    click.echo(f"{output}: all figures; {page}: the same as a page")
    if earlier is not None:
        comparison = compare(earlier, done.to_dict(), tolerance)
        show_comparison(comparison)
        if not comparison.changes:
            raise Failure(f"{before} and this run have no ratio in common: measure the same parts with the same peers")
        if comparison.regressions:
            raise click.exceptions.Exit(1)


def _free_name() -> Path:
    """Return the first of bench.json, bench-2.json and so on of which neither the file nor the page exists."""
    names = (Path(f"bench-{number}.json" if number > 1 else "bench.json") for number in count(1))
    return next(name for name in names if not (name.exists() or name.with_suffix(".html").exists()))


def _images(data: Path | None) -> Iterator[Path]:
    from cloudrt.images.image import find_images

    if data is not None and data.exists():
        yield from (file.path for file in find_images(data))
