"""`cloudrt explore`: statistics and possible errors of a labelled data set."""

from __future__ import annotations

from pathlib import Path

import click

from cloudrt.cli.types import FILE
from cloudrt.system.paths import check_outputs, check_suffixes
from cloudrt.system.progress import progress_bar
from cloudrt.system.terminal import Failure, printable, reports_errors


@click.command()
@click.argument("data", type=FILE)
@click.option(
    "-o",
    "--output",
    type=FILE,
    default=Path("explore.html"),
    show_default=True,
    help="The HTML page.",
)
@click.option("--overwrite", is_flag=True, help="Replace outputs that exist.")
@click.option("--images", type=click.IntRange(0), default=12, show_default=True, help="Random images on the page.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random images.")
@click.option("--show", multiple=True, metavar="NAME", help="Name in train.csv of a further image; can be repeated.")
@click.option("--findings", type=FILE, metavar="CSV", help="Write all findings to this file.")
@click.option("--threads", type=click.IntRange(1), help="Threads that read images. Default: all usable cores.")
@reports_errors
def explore(
    data: Path,
    output: Path,
    overwrite: bool,
    images: int,
    seed: int,
    show: tuple[str, ...],
    findings: Path | None,
    threads: int | None,
) -> None:
    """Write an HTML page about the labelled images of DATA: statistics, examples and possible errors.

    The page shows how often the classes occur, alone and together, how large their masks are and where they lie,
    images with their masks, and findings: invalid rows, missing, damaged and duplicate images, suspicious masks.
    """
    from cloudrt.data.folder import open_data
    from cloudrt.errors import DataError
    from cloudrt.system.machine import usable_cpus

    source = open_data(data)
    names = source.read_names()
    if not names:
        raise DataError(f"{source.train_csv} names no image")
    check_outputs(
        {"--output": output, "--findings": findings},
        {"train.csv": source.train_csv, "data.json": data / "data.json"},
        images=(source.train_images / name for name in names),
        overwrite=overwrite,
    )
    for path in (output, findings):
        if path is not None and path.resolve().is_relative_to(source.train_images.resolve()):
            raise Failure(f"{path} belongs to the data set: give another name")
    check_suffixes({"--output": output}, ".html")
    check_suffixes({"--findings": findings}, ".csv")
    from cloudrt.data.explore import explore as run
    from cloudrt.reports.explore_page import write_exploration, write_findings

    for name in show:
        if name not in names:
            raise Failure(f"--show {name}: not in train.csv; its images have names such as {min(names)}")
    found = run(source, threads or usable_cpus(), progress_bar)
    grid = "x".join(map(str, source.labels.label_grid[::-1]))
    facts = {"Folder": str(data), "Label grid": grid}
    write_exploration(found, output, facts, images, show, seed)
    if findings is not None:
        write_findings(found.findings, findings)
    listed = set(names)
    negatives = sum(image.name not in listed for image in found.images)
    if negatives:
        click.echo(f"{negatives} images have no row in train.csv and are used without any class")
    for kind, some in found.kinds():
        click.echo(printable(f"{kind}: {len(some)}, such as {some[0].key}: {some[0].reason}"))
    classes = ", ".join(
        f"{label} {count}" for label, count in zip(source.labels.classes, found.present.sum(axis=0), strict=True)
    )
    click.echo(f"{len(found.images)} images: {classes}. Open {output} in a browser")
