"""`cloudrt score`: the competition's score of a submission."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from cloudrt.cli.types import FILE, Size
from cloudrt.system.terminal import printable, reports_errors


@click.command()
@click.argument("submission", type=FILE)
@click.argument("truth", type=FILE)
@click.option(
    "--truth-grid",
    type=Size(),
    help="Grid of the masks in TRUTH: the label grid (default, 2100x1400) or the submission grid (525x350).",
)
@click.option("--data", type=FILE, metavar="FOLDER", help="Data set whose data.json defines classes and grids.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reports_errors
def score(submission: Path, truth: Path, truth_grid: tuple[int, int] | None, data: Path | None, as_json: bool) -> None:
    """Compute the mean Dice of SUBMISSION against TRUTH. Both are tables with columns Image_Label,EncodedPixels.

    The mean is over all rows of TRUTH; other rows of SUBMISSION are counted, but not scored. The masks of SUBMISSION
    are on the submission grid.

    For each class, the table also shows the mean Dice over the images in which the class is absent, present, and both
    present and predicted (found), and the share of images in which its presence is predicted correctly.
    """
    from cloudrt.data.folder import read_labels
    from cloudrt.errors import DataError
    from cloudrt.labels import CLOUDS
    from cloudrt.masks.metric import score as compute

    if data is not None and not data.is_dir():
        raise DataError(f"{data} is not a folder")
    result = compute(submission, truth, read_labels(data) if data is not None else CLOUDS, truth_grid)
    if result.ignored_rows:
        click.echo(
            printable(
                f"{result.ignored_rows} rows of {submission} are not in {truth} and were not scored, first "
                f"{result.first_ignored}"
            ),
            err=True,
        )
    if as_json:
        click.echo(json.dumps(asdict(result), indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("Class", "Dice", "if absent", "if present", "if found", "presence right")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, value in result.per_class.items():
        one = result.by_presence[name]
        means = (one.dice_absent, one.dice_present, one.dice_found)
        cells = ["-" if mean is None else f"{mean:.4f}" for mean in means]
        table.add_row(Text(name), f"{value:.4f}", *cells, f"{one.correct:.1%}")
    table.add_section()
    table.add_row("mean", f"{result.mean:.4f}", style="bold")
    table.add_row("all rows empty", f"{result.all_empty:.4f}")
    Console().print(table)
    click.echo(f"{result.images} images")
