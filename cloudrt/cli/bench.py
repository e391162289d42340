"""`cloudrt-bench`: parse, measure, show the table."""

from __future__ import annotations

from pathlib import Path

import click

from cloudrt.system.terminal import Failure, progress_bar, reports_errors


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="Folder of images; made-up scenes by default.")
@click.option(
    "--truth",
    type=click.Path(path_type=Path),
    metavar="CSV",
    help="The labels of DATA, as train.csv has them: accuracy is then the competition's Dice.",
)
@click.option("--images", type=click.IntRange(1), help="At most so many; by default 6, or more to fill whole batches.")
@click.option(
    "--provider",
    type=click.Choice(["auto", "tensorrt", "cuda", "openvino", "cpu"]),
    default="auto",
    show_default=True,
    help="Of cloudrt; the notebook's way runs on the CPU.",
)
@click.option("--batch-size", type=click.IntRange(1), help="Images a batch; the provider's default otherwise.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads, of both ways; each way's default otherwise.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="MODEL's best.pth: the notebook's way in PyTorch.")
@click.option(
    "--baseline", type=click.Path(path_type=Path), help="MODEL's fp32 artifact, for plain ONNX Runtime; MODEL itself."
)
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Passes of each way that count.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(
        ["stages", "pipeline", "throughput", "accuracy", "post-process", "search", "latency", "start-up", "scaling"]
    ),
    help="Measure this part; may be given several times. Scaling, runs of up to 10,000 images, only if asked for.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("bench.json"),
    show_default=True,
    help="All figures; beside it a page of the same name in .html.",
)
@click.option(
    "--compare",
    "before",
    type=click.Path(path_type=Path),
    metavar="JSON",
    help="An earlier output: show which ratios moved beyond their noise, and fail where one fell.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Part by which a ratio may fall before --compare fails.",
)
@reports_errors
def bench(
    models: tuple[Path, ...],
    data: Path | None,
    truth: Path | None,
    images: int | None,
    provider: str,
    batch_size: int | None,
    threads: int | None,
    checkpoint: Path | None,
    baseline: Path | None,
    repeat: int,
    only: tuple[str, ...],
    output: Path,
    before: Path | None,
    tolerance: float,
) -> None:
    """Measure MODEL on this machine: each stage beside its ceiling, the whole from files to CSV, what limits it, and
    the notebook's way and other peers in the same run.

    Then throughput against batch size and threads, the rate and the Dice of every MODEL in every provider,
    post-processing alone beside OpenCV, scipy, cc3d and pycocotools, the search of rules beside nested loops, latency,
    and what a new process waits for. Peers that are not installed are named and left out.

    MODEL is ./model.onnx, else the one that ships with the package; of several, the first is measured, and all are
    compared. The answers of all ways are compared before any time counts. The output is replaced.
    """
    for path in (*models, data, truth, checkpoint, baseline):
        if path is not None and not path.exists():
            raise Failure(f"{path} is missing")
    page = output.with_suffix(".html")
    for path in (output, page):
        if path.exists() and not path.is_file():
            raise Failure(f"{path} is not a regular file: give the name of a file to write")
    if page == output:
        raise Failure(f"{output} would be the page: give the JSON file another name, such as {output.stem}.json")
    from cloudrt.bench.bench_page import write_bench_page
    from cloudrt.bench.compare import compare, read_bench
    from cloudrt.bench.figures import Options
    from cloudrt.bench.measure import bench as run
    from cloudrt.cli.bench_tables import show, show_comparison

    earlier = read_bench(before) if before else None
    options = Options(
        tuple(dict.fromkeys(models)),
        data,
        truth,
        images or 0,
        provider,
        batch_size or 0,
        threads or 0,
        checkpoint,
        baseline,
        repeat,
        only,
    )
    done = run(options, output, progress_bar)
    show(done)
    write_bench_page(done.to_dict(), page)
    click.echo(f"{output}: all figures; {page}: to look at")
    if earlier is not None:
        comparison = compare(earlier, done.to_dict(), tolerance)
        show_comparison(comparison)
        if not comparison.changes:
            raise Failure(f"{before} and this run have no ratio in common: measure the same parts, on the same peers")
        if comparison.regressions:
            raise click.exceptions.Exit(1)
