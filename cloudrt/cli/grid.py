"""`cloudrt grid`: daily frequencies from a store of masks."""

from __future__ import annotations

from pathlib import Path

import click

from cloudrt.cli.types import FILE
from cloudrt.system.terminal import reports_errors


@click.command()
@click.argument("store", type=FILE)
@click.option("--degrees", type=float, default=2.5, show_default=True, help="Side of a cell of the grid.")
@click.option(
    "-o",
    "--output",
    type=FILE,
    default=Path("freq.nc"),
    show_default=True,
    help="The output: NetCDF (.nc) or zarr (.zarr).",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@reports_errors
def grid(store: Path, degrees: float, output: Path, overwrite: bool) -> None:
    """Write the daily frequency of each pattern in STORE, which cloudrt-infer --format zarr wrote.

    The output holds freq(time, lat, lon, pattern), the share of each cell's valid pixels that a pattern covers, and
    valid(time, lat, lon), the share of its pixels that have data.
    """
    from cloudrt.geo.grid import write_frequencies

    days, rows, columns = write_frequencies(store, output, degrees, overwrite=overwrite)
    click.echo(f"{output}: {days} days on {rows}x{columns} cells of {degrees:g} degrees")
