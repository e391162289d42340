"""`cloudrt synth`: write a synthetic data set."""

from __future__ import annotations

from pathlib import Path

import click

from cloudrt.cli.types import Size
from cloudrt.system.terminal import progress_bar, reports_errors


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("-n", "--images", default=200, show_default=True, help="Number of training and test images together.")
@click.option("--size", type=Size(), default="2100x1400", show_default=True, help="Size of the images.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same bytes.")
@click.option("--test-share", default=0.25, show_default=True, help="Fraction of the images for testing.")
@click.option("--jobs", default=0, help="Threads. Default: all usable cores, up to 8.")
@reports_errors
def synth(out: Path, images: int, size: tuple[int, int], *, seed: int, test_share: float, jobs: int) -> None:
    """Write a data set of synthetic scenes to OUT, in the competition's layout.

    The scenes show the four cloud organisations over dark ocean. The labels of the test images are in test_truth.csv.
    OUT must be empty or not exist.
    """
    from cloudrt.data.synth import write_dataset

    with progress_bar("Drawing scenes", images) as advance:
        written = write_dataset(
            out, images, size, seed, test_share=test_share, jobs=jobs, progress=lambda done, total: advance()
        )
    click.echo(f"{written.train} training and {written.test} test images of {size[1]}x{size[0]} in {out}")
    click.echo(f"Next: cloudrt-train {out}")
