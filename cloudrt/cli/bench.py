"""`cloudrt-bench`: parse, measure, show the table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cloudrt.cli.common import Failure, progress_bar, reports_errors

if TYPE_CHECKING:
    from cloudrt.bench.figures import Bench
    from cloudrt.bench.pipeline import PipelineTime
    from cloudrt.bench.search import SearchTime
    from cloudrt.bench.stages import Timing


@click.command()
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="Folder of images; made-up scenes by default.")
@click.option("--images", type=click.IntRange(1), help="At most so many; 12, in whole batches, by default.")
@click.option(
    "--provider", type=click.Choice(["auto", "tensorrt", "cuda", "openvino", "cpu"]), default="auto", show_default=True,
    help="Of cloudrt; the notebook's way runs on the CPU.",
)  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), help="Images a batch; the provider's default otherwise.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads, of both ways; each way's default otherwise.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="MODEL's best.pth: the notebook's way in PyTorch.")
@click.option(
    "--baseline", type=click.Path(path_type=Path), help="MODEL's fp32 artifact, for plain ONNX Runtime; MODEL itself."
)
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Passes of each way that count.")
@click.option(
    "--only", multiple=True, type=click.Choice(["stages", "pipeline", "post-process", "search", "start-up"]),
    help="Measure this part; may be given several times.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("bench.json"), show_default=True)
@reports_errors
def bench(
    model: Path | None, data: Path | None, images: int | None, provider: str, batch_size: int | None,
    threads: int | None, checkpoint: Path | None, baseline: Path | None, repeat: int, only: tuple[str, ...],
    output: Path,
) -> None:  # fmt: skip
    """Measure decode, infer, post-process and the whole with MODEL, beside the notebook's way in the same run.

    Then post-processing alone beside OpenCV, scipy, cc3d and pycocotools, the search of rules beside nested loops, and
    what a new process waits for.

    MODEL is ./model.onnx, else the one that ships with the package. The answers of both ways are compared before any
    time counts. The figures are also written to bench.json, which is replaced.
    """
    for path in (data, checkpoint, baseline):
        if path is not None and not path.exists():
            raise Failure(f"{path} is missing")
    if output.exists() and not output.is_file():
        raise Failure(f"{output} is not a regular file: give the name of a file to write")
    from cloudrt.bench.figures import Options
    from cloudrt.bench.run import bench as run

    options = Options(
        model, data, images or 0, provider, batch_size or 0, threads or 0, checkpoint, baseline, repeat, only
    )
    _show(run(options, output, progress_bar))
    click.echo(f"{output}: all figures")


def _show(done: Bench) -> None:
    model, pictures = done.model, done.images
    click.echo(
        f"{model['file']}: {model['architecture']} with {model['encoder']}, {model['precision']}; "
        f"{model['plan']}, {model['threads']} threads"
    )
    for name, reason in model["passed_over"].items():
        click.echo(f"  not {name}: {reason}")
    if done.stages:
        _show_stages(done)
    if done.pipeline:
        _show_pipeline(done.pipeline)
    if done.postprocess:
        _show_postprocess(done)
    if done.search:
        _show_search(done.search)
    if done.startup:
        click.echo(
            f"Start-up: import cloudrt {done.startup['import_s']:.2f} s after numpy's {done.startup['numpy_s']:.2f} s; "
            f"first post-processing {done.startup['first_call_s']:.2f} s"
        )
    if pictures["unreadable"]:
        click.echo(f"Left out: {pictures['unreadable']} images that one way cannot read")
    if done.peak_rss_mb is not None:
        click.echo(f"Peak memory of the process, all ways together: {done.peak_rss_mb:.0f} MB")


def _show_stages(done: Bench) -> None:
    from rich.console import Console
    from rich.table import Table

    pictures, agreement = done.images, done.agreement
    table = Table(title=f"{pictures['count']} {pictures['source']}, median of {done.options.repeat} ± IQR, per image")
    for column in ("stage", "cloudrt ms", "images/s", "notebook ms", "images/s", "ratio"):
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    for stage in done.stages:
        table.add_row(stage.name, *_cells(stage.ours), *_cells(stage.notebook), f"{_three(stage.ratio)}x")
    Console().print(table)
    click.echo(f"The notebook's way: {done.peer}, one image after another")
    for name, reason in done.skipped.items():
        click.echo(f"Skipped: {name}: {reason}")
    noisy = [stage.name for stage in done.stages if stage.ours.noisy or stage.notebook.noisy]
    if noisy:
        click.echo(f"Noisy: {', '.join(noisy)}: repetitions are far apart; run again on a quiet machine")
    click.echo(
        f"Answers: {agreement.rows_identical} rows byte for byte alike from the same maps ({agreement.masks} masks); "
        f"Dice between the submissions {agreement.dice:.4f}, {agreement.empty_mismatch:.1%} of rows empty in one only"
    )


def _show_pipeline(whole: PipelineTime) -> None:
    alone = ", ".join(f"{name} {_three(1 / timing.median)}" for name, timing in whole.stages.items())
    limit = f"{whole.cores} cores without a pause" if whole.cores else "the slower of decode and infer"
    click.echo(f"Files to CSV: {_three(1 / whole.whole.median)} images/s; each stage alone: {alone}")
    click.echo(f"That is {whole.share:.2f} of what {limit} allow")
    for name, timing in whole.peers.items():
        click.echo(f"  {_three(whole.ratio(name))}x {name} ({_three(1 / timing.median)} images/s)")


def _show_postprocess(done: Bench) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for form in dict.fromkeys(measured.form for measured in done.postprocess):
        sets = [measured for measured in done.postprocess if measured.form == form]
        table = Table(title=f"Post-processing from {form}, one thread")
        table.add_column("time a map, in ours", no_wrap=True)
        for measured in sets:
            table.add_column(measured.kind, justify="right", no_wrap=True)
        table.add_row("runs a map", *(f"{measured.runs:.0f}" for measured in sets), style="dim")
        table.add_row("components a map", *(f"{measured.components:.1f}" for measured in sets), style="dim")
        table.add_row("cloudrt", *(f"{_three(measured.seconds * 1e6)} µs" for measured in sets), end_section=True)
        for index, peer in enumerate(sets[0].peers):
            table.add_row(peer.name, *(f"{_three(measured.peers[index].ratio)}x" for measured in sets))
        console.print(table)
        for measured in sets:
            whole = sum(measured.parts.values())
            shares = (f"{name} {seconds / whole:.0%}" for name, seconds in measured.parts.items())
            click.echo(f"{measured.kind}, where ours goes: {', '.join(shares)}")
    for kind, figures in done.rle.items():
        words = (
            f"{name} " + ", ".join(f"{_three(peer['ratio'])}x {peer['name']}" for peer in one["peers"])
            for name, one in figures.items()
        )
        click.echo(f"RLE of the {kind} masks: {'; '.join(words)}")


def _show_search(search: SearchTime) -> None:
    rules = f"{search.thresholds} thresholds x {search.min_areas} min areas x {search.classes} classes"
    click.echo(
        f"Search of {rules} on {search.images} images: {_three(search.seconds)} s on {search.threads} threads "
        f"(all 256 thresholds {_three(search.all_seconds)} s, choosing {_three(search.choice_seconds)} s); "
        f"nested loops {search.loop_seconds / 3600:.2f} h, {search.ratio:,.0f}x, from a sample of their calls"
    )


def _cells(timing: Timing) -> tuple[str, str]:
    return f"{_three(timing.median * 1e3)} ± {_three(timing.iqr * 1e3)}", _three(1 / timing.median)


def _three(value: float) -> str:
    """Three digits of a number, never in powers of ten."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{decimals}f}"
