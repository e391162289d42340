"""`cloudrt explore`: parse, look at the data, say what was found."""

from __future__ import annotations

from pathlib import Path

import click

from cloudrt.system.terminal import Failure, progress_bar, reports_errors


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("explore.html"),
    show_default=True,
    help="The page.",
)
@click.option("--overwrite", is_flag=True, help="Replace outputs that exist.")
@click.option("--images", type=click.IntRange(0), default=12, show_default=True, help="Random images on the page.")
@click.option("--seed", default=0, show_default=True, help="Of the random images.")
@click.option("--show", multiple=True, metavar="NAME", help="An image to show besides, as train.csv names it.")
@click.option("--findings", type=click.Path(path_type=Path), metavar="CSV", help="Write all findings here too.")
@click.option("--threads", type=click.IntRange(1), help="That read images; all that may be used by default.")
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
    """Look at the labelled images of DATA: a page of figures, pictures and what is doubtful.

    The page shows how often each class occurs, alone and together with the others, how large its masks are and where
    they lie, images with their masks, and an audit: rows that are wrong, images that are missing, damaged or there
    twice, masks that are suspicious.
    """
    from cloudrt.data.folder import open_data
    from cloudrt.errors import DataError
    from cloudrt.system.machine import usable_cpus

    source = open_data(data)
    outputs = [path for path in (output, findings) if path is not None]
    for path in outputs:
        if path.is_dir():
            raise Failure(f"{path} is a folder: give the name of a file to write")
        inputs = (source.train_csv, data / "data.json", source.train_images)
        if any(path.resolve().is_relative_to(one.resolve()) for one in inputs):
            raise Failure(f"{path} belongs to the data set: give another name")
        if path.exists() and not overwrite:
            raise Failure(f"{path} exists: --overwrite it, or name another")
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise Failure("--output and --findings name one file")
    from cloudrt.data.explore import explore as run
    from cloudrt.reports.explore_page import write_exploration, write_findings

    names = source.read_names()
    if not names:
        raise DataError(f"{source.train_csv} names no image")
    for name in show:
        if name not in names:
            raise Failure(f"--show {name}: train.csv does not name it; its images have names such as {min(names)}")
    with progress_bar("Looking at images", len(names)) as advance:
        found = run(source, threads or usable_cpus(), advance)
    grid = "x".join(map(str, source.labels.label_grid[::-1]))
    facts = {"Folder": str(data), "Label grid": grid}
    write_exploration(found, source.train_images, output, data.resolve().name, facts, images, show, seed)
    if findings is not None:
        write_findings(found.findings, findings)
    for kind, some in found.kinds():
        click.echo(f"{kind}: {len(some)}, such as {some[0].key}: {some[0].reason}")
    classes = ", ".join(
        f"{label} {count}" for label, count in zip(source.labels.classes, found.present.sum(axis=0), strict=True)
    )
    click.echo(f"{len(found.scenes)} images: {classes}. Look at {output}")
