"""`cloudrt-infer --cluster`: its options, what of the others does not apply, and what it says."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from cloudrt.system.terminal import Failure, progress_bar, say_logs

if TYPE_CHECKING:
    from cloudrt.cluster.driver import Ask
    from cloudrt.cluster.nodes import Share
    from cloudrt.engines.plan import Plan

ALONE = ("report", "stats", "masks", "overlays", "save_probabilities", "devices")
"""Options of a single machine."""
OWN = ("partitions", "partition_format", "partition_size", "endpoint")
"""Options that need --cluster."""


def cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a cluster to a command."""
    options = (
        click.option(
            "--cluster",
            is_flag=False,
            flag_value="local",
            metavar="[ADDRESS]",
            help="Run on a Ray cluster: HOST:PORT, or auto; without ADDRESS, on this machine. INPUTS may be URIs.",
        ),
        click.option(
            "--partitions", metavar="FOLDER|URI", help="Where --cluster keeps finished rows; OUTPUT.parts otherwise."
        ),
        click.option("--partition-format", type=click.Choice(["parquet", "csv"]), help="Of those; parquet by default."),
        click.option("--partition-size", type=click.IntRange(1, 1_000_000), help="Images in each; up to 1024."),
        click.option("--endpoint", metavar="URL", help="Of an S3-compatible store; AWS_ENDPOINT_URL otherwise."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def refuse_options(values: Mapping[str, Any], clustered: bool) -> None:
    """Refuse by name the options that do not apply with --cluster, or without it."""
    for name in ALONE if clustered else OWN:
        if values[name]:
            option = f"--{name.replace('_', '-')}"
            raise Failure(
                f"{option} is of a single machine: leave it out with --cluster"
                if clustered
                else f"{option} belongs to --cluster: give both, or neither"
            )


def infer_on(asked: Ask) -> None:
    """Run what is asked for, say how and what came of it; exit status 1 where images failed."""
    from cloudrt.cluster import infer_on_cluster
    from cloudrt.inference.submission import failures_path

    say_logs("cloudrt", logging.INFO)
    began = time.perf_counter()
    with ExitStack() as stack:

        def started(plan: Plan, share: Share, images: int, resumed: int) -> Callable[[Mapping[str, int]], None]:
            what = f"{share.cpus} CPUs" + (" and a GPU" if share.gpus else "")
            click.echo(f"{share.workers} workers of {what} each; {plan.describe()}", err=True)
            if asked.resume:
                said = f"{resumed} images are in finished partitions, going on" if resumed else "Nothing to resume"
                click.echo(said, err=True)
            advance = stack.enter_context(progress_bar("Segmenting", images - resumed))
            failed = 0

            def done(counts: Mapping[str, int]) -> None:
                nonlocal failed
                failed += counts["failed"]
                advance(int(counts["images"]), failed=failed)

            return done

        def merging(images: int) -> Callable[[], object]:
            stack.close()
            return stack.enter_context(progress_bar("Merging", images))

        try:
            run = infer_on_cluster(asked, started, merging, _lost)
        except KeyboardInterrupt:
            click.echo("Finished partitions are kept; --resume goes on from there", err=True)
            raise
    seconds = time.perf_counter() - began
    click.echo(
        f"{asked.output}: {run.images} images, {run.rows_with_mask} masks, {run.failed} failed, "
        f"{(run.images - run.resumed) / seconds:.1f} images/s with start and merge"
    )
    if run.failed:
        click.echo(f"{failures_path(asked.output)} lists what failed and why", err=True)
        raise SystemExit(1)


def _lost(line: str) -> None:
    """End the process: nothing of Ray would return any more."""
    click.echo(f"\nError: {line}", err=True)
    sys.stdout.flush()
    os._exit(2)
