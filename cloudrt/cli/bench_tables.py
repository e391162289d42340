"""The tables of `cloudrt-bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cloudrt.bench.figures import three_digits

if TYPE_CHECKING:
    from cloudrt.bench.accuracy import Accuracy
    from cloudrt.bench.ceilings import Ceilings
    from cloudrt.bench.compare import Comparison
    from cloudrt.bench.figures import Bench
    from cloudrt.bench.pipeline import PipelineTime
    from cloudrt.bench.search import SearchTime
    from cloudrt.bench.stages import Timing
    from cloudrt.bench.throughput import Point


def show(done: Bench) -> None:
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
    if done.ceilings:
        _show_ceilings(done.ceilings)
    for what, points in (done.throughput or {}).items():
        _show_throughput(what, points)
    if done.accuracy:
        _show_accuracy(done.accuracy)
    if done.postprocess:
        _show_postprocess(done)
    if done.search:
        _show_search(done.search)
    _show_waits(done)
    for name, reason in done.skipped.items():
        click.echo(f"Skipped: {name}: {reason}")
    if pictures["unreadable"]:
        click.echo(f"Left out: {pictures['unreadable']} images that one way cannot read")
    if done.peak_rss_mb is not None:
        click.echo(f"Peak memory of the process, all ways together: {done.peak_rss_mb:.0f} MB")


def _show_waits(done: Bench) -> None:
    startup = done.startup
    if startup:
        click.echo(
            f"Start-up: import cloudrt {startup['import_s']:.2f} s after numpy's {startup['numpy_s']:.2f} s; first "
            f"post-processing {startup['first_call_s']:.2f} s; cloudrt-infer on one image, caches empty, "
            f"{startup['command_cold_s']:.1f} s, after that {startup['command_warm_s']:.1f} s"
            + (f" and {startup['command_peak_mb']:.0f} MB at most" if startup["command_peak_mb"] else "")
        )
    if done.latency:
        words = ", ".join(f"p{share} {three_digits(value)} ms" for share, value in done.latency.percentiles.items())
        click.echo(f"One image alone, file to RLE: {words} ({done.latency.requests} requests)")
    if done.scaling:
        words = ", ".join(f"{run.images:,}: {three_digits(1000 * run.seconds)} ms" for run in done.scaling.runs)
        click.echo(
            f"An image in a run of {words}; {done.scaling.cost:.2f} times as much in the longest as in the shortest, "
            f"{done.scaling.cpu_cost:.2f} times in processor time"
        )


def _show_stages(done: Bench) -> None:
    from rich.console import Console
    from rich.table import Table

    pictures, agreement = done.images, done.agreement
    table = Table(title=f"{pictures['count']} {pictures['source']}, median of {done.options.repeat} ± IQR, per image")
    for column in ("stage", "cloudrt ms", "images/s", "notebook ms", "images/s", "ratio"):
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    for stage in done.stages:
        table.add_row(stage.name, *_cells(stage.ours), *_cells(stage.notebook), f"{three_digits(stage.ratio)}x")
    Console().print(table)
    click.echo(f"The notebook's way: {done.peer}, one image after another")
    noisy = [stage.name for stage in done.stages if stage.ours.noisy or stage.notebook.noisy]
    if noisy:
        click.echo(f"Noisy: {', '.join(noisy)}: repetitions are far apart; run again on a quiet machine")
    click.echo(
        f"Answers: {agreement.rows_identical} rows byte for byte alike from the same maps ({agreement.masks} masks); "
        f"Dice between the submissions {agreement.dice:.4f}, {agreement.empty_mismatch:.1%} of rows empty in one only"
    )


def _show_pipeline(whole: PipelineTime) -> None:
    alone = ", ".join(f"{name} {three_digits(1 / timing.median)}" for name, timing in whole.stages.items())
    limit = f"{whole.cores} cores without a pause" if whole.cores else "the slower of decode and infer"
    click.echo(f"Files to CSV: {three_digits(1 / whole.whole.median)} images/s; each stage alone: {alone}")
    click.echo(f"That is {whole.share:.2f} of what {limit} allow; {whole.bottleneck} limits it")
    spent = sum(timing.median for name, timing in whole.cpu_seconds.items() if name == "whole")
    click.echo(f"Processor time: {three_digits(1000 * spent)} ms an image")
    for name, timing in whole.peers.items():
        click.echo(f"  {three_digits(whole.ratio(name))}x {name} ({three_digits(1 / timing.median)} images/s)")


def _show_ceilings(ceilings: Ceilings) -> None:
    peak = (
        f", {ceilings.peak_share:.0%} of the measured peak of {three_digits(ceilings.peak_gflops)}"
        if ceilings.peak_gflops
        else ""
    )
    click.echo(f"decode: {three_digits(ceilings.decode_mb)} MB/s, {three_digits(ceilings.decode_megapixels)} megapixels/s")
    click.echo(f"infer: {three_digits(ceilings.gflop_per_image)} GFLOP an image, {three_digits(ceilings.gflops)} GFLOP/s{peak}")
    click.echo(f"post-process: {three_digits(ceilings.map_reads)} times as long as reading the map once")
    click.echo(f"write: {ceilings.rows:,.0f} rows/s")


def _show_throughput(what: str, points: list[Point]) -> None:
    attribute = what.replace(" ", "_")
    best = max(points, key=lambda point: point.images_per_second)
    words = ", ".join(f"{getattr(point, attribute)}: {three_digits(point.images_per_second)}" for point in points)
    click.echo(f"Engine, images/s by {what}: {words}; best at {getattr(best, attribute)}")


def _show_accuracy(accuracy: Accuracy) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Speed and accuracy; Dice against {accuracy.against}")
    for column in ("model", "precision", "provider", "images/s", "Dice", "empty in one", "front"):
        table.add_column(column, justify="right" if column in ("images/s", "Dice", "empty in one") else "left")
    for way in sorted(accuracy.ways, key=lambda way: way.timing.median):
        table.add_row(
            way.model,
            way.precision,
            way.provider,
            three_digits(1 / way.timing.median),
            f"{way.dice:.4f}",
            f"{way.empty_mismatch:.1%}",
            "*" if way.front else "",
        )
    Console().print(table)
    if accuracy.all_empty is not None:
        click.echo(f"Predicting nothing scores {accuracy.all_empty:.4f}")
    for name, reason in accuracy.skipped.items():
        click.echo(f"Not {name}: {reason}")


def show_comparison(comparison: Comparison) -> None:
    """Show what changed since another run."""
    from rich.console import Console
    from rich.table import Table

    for difference in comparison.differences:
        click.echo(f"Not alike: {difference}")
    moved = [change for change in comparison.changes if change.verdict != "same"]
    click.echo(f"{len(comparison.changes) - len(moved)} of {len(comparison.changes)} ratios are the same within noise")
    if moved:
        table = Table("ratio", "before", "now", "change", "")
        for change in moved:
            relative = change.after / change.before - 1
            table.add_row(change.name, three_digits(change.before), three_digits(change.after), f"{relative:+.0%}", change.verdict)
        Console().print(table)
    for words, names in (("Not measured now", comparison.only_before), ("New", comparison.only_after)):
        if names:
            click.echo(f"{words}: {'; '.join(names)}")


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
        table.add_row("cloudrt", *(f"{three_digits(measured.seconds * 1e6)} µs" for measured in sets), end_section=True)
        for index, peer in enumerate(sets[0].peers):
            table.add_row(peer.name, *(f"{three_digits(measured.peers[index].ratio)}x" for measured in sets))
        console.print(table)
        for measured in sets:
            whole = sum(measured.parts.values())
            shares = (f"{name} {seconds / whole:.0%}" for name, seconds in measured.parts.items())
            click.echo(f"{measured.kind}, where ours goes: {', '.join(shares)}")
    for kind, figures in done.rle.items():
        words = (
            f"{name} " + ", ".join(f"{three_digits(peer['ratio'])}x {peer['name']}" for peer in one["peers"])
            for name, one in figures.items()
        )
        click.echo(f"RLE of the {kind} masks: {'; '.join(words)}")


def _show_search(search: SearchTime) -> None:
    rules = f"{search.thresholds} thresholds x {search.min_areas} min areas x {search.classes} classes"
    click.echo(
        f"Search of {rules} on {search.images} images: {three_digits(search.seconds)} s on {search.threads} threads "
        f"(all 256 thresholds {three_digits(search.all_seconds)} s, choosing {three_digits(search.choice_seconds)} s); "
        f"nested loops {_duration(search.loop_seconds)}, {search.ratio:,.0f}x, from a sample of their calls"
    )


def _cells(timing: Timing) -> tuple[str, str]:
    return f"{three_digits(timing.median * 1e3)} ± {three_digits(timing.iqr * 1e3)}", three_digits(1 / timing.median)


def _duration(seconds: float) -> str:
    """Return seconds, minutes or hours, whichever has a number of few digits."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{three_digits(seconds / length)} {unit}"
    return f"{three_digits(seconds)} s"
