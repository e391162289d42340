"""`cloudrt synth`: write a synthetic data set."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

import click
from click.core import ParameterSource

from cloudrt.cli.types import FILE, Size
from cloudrt.labels import Grid
from cloudrt.system.progress import progress_bar
from cloudrt.system.terminal import Failure, reports_errors


@click.command()
@click.argument("out", type=FILE)
@click.option("-n", "--images", default=200, show_default=True, help="Number of training and test images together.")
@click.option("--size", type=Size(), default="2100x1400", show_default=True, help="Size of the images.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same bytes.")
@click.option("--test-share", default=0.25, show_default=True, help="Fraction of the images for testing.")
@click.option(
    "--panorama",
    type=Size(),
    help="Instead write panoramas of this size, such as 36000x3000, one per day; multiples of 4.",
)
@click.option("--days", default=1, show_default=True, help="Number of panoramas.")
@click.option("--threads", default=0, help="Threads that draw scenes. Default: all usable cores, up to 8.")
@reports_errors
def synth(
    out: Path, images: int, size: tuple[int, int], panorama: tuple[int, int] | None, *, days: int, **options: Any
) -> None:
    """Write a data set of synthetic scenes to OUT, in the competition's layout.

    The scenes show the four cloud organisations over dark ocean. The labels of the test images are in test_truth.csv.
    OUT must be empty or not exist.

    With --panorama, it writes images of a part of the Earth instead, composed of scenes of --size. Their names contain
    day, longitudes and latitudes; truth.csv has their masks.
    """
    given = click.get_current_context().get_parameter_source
    for name in ("days",) if panorama is None else ("images", "test_share"):
        if given(name) is not ParameterSource.DEFAULT:
            option = f"--{name.replace('_', '-')}"
            raise Failure(f"{option} {'needs' if panorama is None else 'does not apply with'} --panorama")
    if panorama is not None:
        _write_panoramas(out, panorama, days, size, seed=options["seed"], threads=options["threads"])
        return
    from cloudrt.data.synth import write_dataset

    with progress_bar("Drawing scenes", images) as advance:
        written = write_dataset(out, images, size, **options, progress=lambda done, total: advance())
    click.echo(f"{written.train} training and {written.test} test images of {size[1]}x{size[0]} in {out}")
    click.echo(f"Next: cloudrt-train {quote(str(out))}")


def _write_panoramas(out: Path, panorama: Grid, days: int, scene: Grid, *, seed: int, threads: int) -> None:
    from cloudrt.data.panorama import write_panoramas

    scenes = days * -(-panorama[0] // scene[0]) * -(-panorama[1] // scene[1])
    with progress_bar("Drawing scenes", scenes) as advance:
        paths = write_panoramas(
            out, panorama, days, seed, scene=scene, threads=threads, progress=lambda done, total: advance()
        )
    click.echo(f"{len(paths)} panoramas of {panorama[1]}x{panorama[0]} in {out}")
    click.echo(f"Next: cloudrt-infer {quote(str(out))} --tile")
