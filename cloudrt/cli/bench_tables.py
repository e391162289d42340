"""The tables of `cloudrt-bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cloudrt.bench.figures import three_digits

if TYPE_CHECKING:
    from rich.table import Table

    from cloudrt.bench.accuracy import Accuracy
    from cloudrt.bench.ceilings import Ceilings
    from cloudrt.bench.compare import BenchComparison
    from cloudrt.bench.figures import BenchResult
    from cloudrt.bench.host import Host
    from cloudrt.bench.pipeline import PipelineTime
    from cloudrt.bench.search import SearchTime
    from cloudrt.bench.stages import Timing
    from cloudrt.bench.throughput import Point


def show(done: BenchResult) -> None:
    """Print all parts that were measured."""
    model = done.model
    click.echo(
        f"{model['file']}: {model['architecture']} with {model['encoder']}, {model['precision']}; "
        f"{model['plan']}, {model['threads']} threads"
    )
    for name, reason in model["passed_over"].items():
        click.echo(f"  {name} was not chosen: {reason}")
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
    if done.host:
        _show_host(done.host)
    _show_latencies(done)
    for name, reason in done.skipped.items():
        click.echo(f"Skipped: {name}: {reason}")
    if done.images["unreadable"]:
        click.echo(f"Skipped: {done.images['unreadable']} images that cloudrt or OpenCV cannot read")
    if done.peak_rss_mb is not None:
        click.echo(f"Peak memory of the process, with all peers: {done.peak_rss_mb:.0f} MB")


def _show_latencies(done: BenchResult) -> None:
    startup = done.startup
    if startup:
        click.echo(
            f"Start-up: import cloudrt {startup['import_s']:.2f} s after NumPy's {startup['numpy_s']:.2f} s; first "
            f"post-processing {startup['first_call_s']:.2f} s; cloudrt-infer on one image "
            f"{startup['command_cold_s']:.1f} s with empty caches, {startup['command_warm_s']:.1f} s with filled ones"
            + (f", {startup['command_peak_mb']:.0f} MB peak memory" if startup["command_peak_mb"] else "")
        )
    if done.latency:
        words = ", ".join(f"p{share} {three_digits(value)} ms" for share, value in done.latency.percentiles.items())
        click.echo(f"Latency of one image, file to RLE: {words} ({done.latency.requests} requests)")
    if done.scaling:
        words = ", ".join(f"{run.images:,}: {three_digits(1000 * run.seconds)} ms" for run in done.scaling.runs)
        click.echo(
            f"Time per image by length of the run: {words}; the longest run takes {done.scaling.cost:.2f} times as "
            f"long per image as the shortest, and {done.scaling.cpu_cost:.2f} times the CPU time"
        )


def _show_host(host: Host) -> None:
    table = _table(
        ("batch size", "images/s without work", "post-processing alone", "in the pipeline", "share"),
        title=f"The pipeline without a network, {host.threads} threads",
    )
    for size, timing in host.handover.items():
        cells = [str(size), three_digits(1 / timing.median)]
        if size in host.alone:
            cells += [three_digits(1 / timings[size].median) for timings in (host.alone, host.whole)]
            cells.append(f"{host.share(size):.2f}")
        table.add_row(*cells)
    _print(table)
    click.echo(
        f"The slowest batch size reaches {host.evenness:.2f} of the rate of the fastest. If copying, computing and "
        f"post-processing take equally long, the pipeline reaches {host.overlap_share:.2f} of the rate of one of them"
    )


def _show_stages(done: BenchResult) -> None:
    images, agreement = done.images, done.agreement
    table = _table(
        ("stage", "cloudrt ms", "images/s", "notebook ms", "images/s", "ratio"),
        title=f"{images['count']} {images['source']}, median of {done.options.repeat} ± IQR, per image",
        no_wrap=True,
    )
    for stage in done.stages:
        table.add_row(stage.name, *_cells(stage.ours), *_cells(stage.notebook), f"{three_digits(stage.ratio)}x")
    _print(table)
    click.echo(f"The notebook's way: {done.peer}, one image at a time")
    noisy = [stage.name for stage in done.stages if stage.ours.noisy or stage.notebook.noisy]
    if noisy:
        click.echo(f"Noisy: {', '.join(noisy)}: the repetitions differ much; run again without other load")
    assert agreement.dice is not None and agreement.empty_mismatch is not None  # the stages write submissions
    click.echo(
        f"Agreement: {agreement.rows_identical} rows byte-identical from the same maps ({agreement.masks} masks); Dice "
        f"between the submissions {agreement.dice:.4f}, {agreement.empty_mismatch:.1%} of rows empty in one only"
    )


def _show_pipeline(whole: PipelineTime) -> None:
    alone = ", ".join(f"{name} {three_digits(1 / timing.median)}" for name, timing in whole.stages.items())
    limit = f"{whole.cores} cores that are never idle" if whole.cores else "the slower of decode and infer"
    click.echo(f"Files to CSV: {three_digits(1 / whole.whole.median)} images/s; each stage alone: {alone}")
    click.echo(f"{whole.share:.2f} of the ceiling, {limit}; limited by {whole.bottleneck}")
    click.echo(f"CPU time: {three_digits(1000 * whole.cpu_seconds['whole'].median)} ms per image")
    for name, timing in whole.peers.items():
        click.echo(f"  {three_digits(whole.ratio(name))}x {name} ({three_digits(1 / timing.median)} images/s)")


def _show_ceilings(ceilings: Ceilings) -> None:
    peak = (
        f", {ceilings.peak_share:.0%} of the measured peak of {three_digits(ceilings.peak_gflops)}"
        if ceilings.peak_gflops
        else ""
    )
    gflop, rate = three_digits(ceilings.gflop_per_image), three_digits(ceilings.gflops)
    click.echo(
        f"decode: {three_digits(ceilings.decode_mb)} MB/s, {three_digits(ceilings.decode_megapixels)} megapixels/s"
    )
    click.echo(f"infer: {gflop} GFLOP per image, {rate} GFLOP/s{peak}")
    click.echo(f"post-process: {three_digits(ceilings.map_reads)} times the time to read the map once")
    click.echo(f"write: {ceilings.rows:,.0f} rows/s")


def _show_throughput(what: str, points: list[Point]) -> None:
    attribute = what.replace(" ", "_")
    best = max(points, key=lambda point: point.images_per_second)
    words = ", ".join(f"{getattr(point, attribute)}: {three_digits(point.images_per_second)}" for point in points)
    click.echo(f"Engine, images/s by {what}: {words}; best at {getattr(best, attribute)}")


def _show_accuracy(accuracy: Accuracy) -> None:
    columns = ("model", "precision", "provider", "images/s", "Dice", "empty in one", "front")
    table = _table(columns, title=f"Speed and accuracy; Dice against {accuracy.against}", left=(0, 1, 2, 6))
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
    _print(table)
    if accuracy.all_empty is not None:
        click.echo(f"A submission without any mask scores {accuracy.all_empty:.4f}")
    for name, reason in accuracy.skipped.items():
        click.echo(f"Skipped: {name}: {reason}")


def show_comparison(comparison: BenchComparison) -> None:
    """Print what changed since another run."""
    for difference in comparison.differences:
        click.echo(f"The runs differ: {difference}")
    moved = [change for change in comparison.changes if change.verdict != "same"]
    click.echo(f"{len(comparison.changes) - len(moved)} of {len(comparison.changes)} ratios are the same within noise")
    if moved:
        table = _table(("ratio", "before", "now", "change", ""), left=(0, 4))
        for change in moved:
            relative = f"{change.after / change.before - 1:+.0%}"
            table.add_row(
                change.name, three_digits(change.before), three_digits(change.after), relative, change.verdict
            )
        _print(table)
    for words, names in (("Not measured now", comparison.only_before), ("New", comparison.only_after)):
        if names:
            click.echo(f"{words}: {'; '.join(names)}")


def _show_postprocess(done: BenchResult) -> None:
    for form in dict.fromkeys(measured.form for measured in done.postprocess):
        sets = [measured for measured in done.postprocess if measured.form == form]
        columns = ("time per map, relative to cloudrt", *(measured.kind for measured in sets))
        table = _table(columns, title=f"Post-processing from {form}, one thread", no_wrap=True)
        table.add_row("runs per map", *(f"{measured.runs:.0f}" for measured in sets), style="dim")
        table.add_row("components per map", *(f"{measured.components:.1f}" for measured in sets), style="dim")
        ours = (f"{three_digits(measured.seconds * 1e6)} µs" for measured in sets)
        table.add_row("cloudrt", *ours, end_section=True)
        for index, peer in enumerate(sets[0].peers):
            name = "reading the map once" if peer.name == "floor" else peer.name
            table.add_row(name, *(f"{three_digits(measured.peers[index].ratio)}x" for measured in sets))
        _print(table)
        for measured in sets:
            whole = sum(measured.parts.values())
            shares = (f"{name} {seconds / whole:.0%}" for name, seconds in measured.parts.items())
            click.echo(f"{measured.kind}, time of cloudrt by kernel: {', '.join(shares)}")
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
        f"nested loops {_duration(search.loop_seconds)}, {search.ratio:,.0f}x, extrapolated from a sample"
    )


def _table(
    columns: tuple[str, ...], *, title: str | None = None, left: tuple[int, ...] = (0,), no_wrap: bool = False
) -> Table:
    """Return an empty table; the columns `left` are aligned to the left, the others to the right."""
    from rich.table import Table

    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number in left else "right", no_wrap=no_wrap)
    return table


def _print(table: Table) -> None:
    from rich.console import Console

    Console().print(table)


def _cells(timing: Timing) -> tuple[str, str]:
    return f"{three_digits(timing.median * 1e3)} ± {three_digits(timing.iqr * 1e3)}", three_digits(1 / timing.median)


def _duration(seconds: float) -> str:
    """Return seconds, minutes or hours, whichever needs few digits."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{three_digits(seconds / length)} {unit}"
    return f"{three_digits(seconds)} s"
