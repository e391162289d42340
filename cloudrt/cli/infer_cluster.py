"""`cloudrt-infer --cluster`: its options, the options that it refuses, and its output."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from cloudrt.system.progress import no_progress, progress_bar
from cloudrt.system.terminal import Failure, printable

if TYPE_CHECKING:
    from cloudrt.cluster.nodes import Share
    from cloudrt.engines.plan import Plan
    from cloudrt.inference.task import InferTask

SINGLE_MACHINE = ("report", "stats", "masks", "overlays", "save_probabilities", "devices")
"""Options that do not apply with --cluster."""
CLUSTER_ONLY = ("partitions", "partition_format", "partition_size", "endpoint")
"""Options that need --cluster."""

_OPTIONS = (
    click.option(
        "--cluster",
        is_flag=False,
        flag_value="local",
        metavar="[ADDRESS]",
        help="Run on a Ray cluster. ADDRESS is HOST:PORT, or auto for the cluster of this machine; without ADDRESS, "
        "Ray is started on this machine. INPUTS may be URIs.",
    ),
    click.option(
        "--partitions", metavar="FOLDER|URI", help="Where --cluster stores finished rows. Default: OUTPUT.parts."
    ),
    click.option(
        "--partition-format", type=click.Choice(["parquet", "csv"]), help="Partition format. Default: parquet."
    ),
    click.option(
        "--partition-size",
        type=click.IntRange(1, 1_000_000),
        help="Images per partition. Default: at most 1024, rounded up to whole batches; at most 16 with --tile.",
    ),
    click.option(
        "--endpoint",
        metavar="URL",
        help="URL of an S3-compatible store. Default: the variable AWS_ENDPOINT_URL_S3, else AWS_ENDPOINT_URL.",
    ),
)


def cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a cluster to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def refuse_options(values: Mapping[str, Any], clustered: bool) -> None:
    """Refuse by name the options that do not apply with --cluster, or without it."""
    for name in SINGLE_MACHINE if clustered else CLUSTER_ONLY:
        if values[name]:
            option = f"--{name.replace('_', '-')}"
            raise Failure(
                f"{option} does not work with --cluster: leave it out" if clustered else f"{option} needs --cluster"
            )


def infer_on(task: InferTask, given: Mapping[str, Any], quiet: bool = False) -> None:
    """Run a task on a cluster and, unless `quiet`, print the result; exit with status 1 if images failed."""
    import ray  # noqa: F401 - if it is missing, the error names the extra ray, not parquet

    from cloudrt.cluster import ClusterOptions, infer_on_cluster

    options = ClusterOptions(
        address=given["cluster"],
        partitions=given["partitions"],
        partition_format=given["partition_format"] or "parquet",
        partition_size=given["partition_size"] or 0,
        endpoint=given["endpoint"],
    )
    began = time.perf_counter()
    bar = no_progress if quiet else progress_bar
    with ExitStack() as stack:

        def started(plan: Plan, share: Share, images: int, resumed: int) -> Callable[[Mapping[str, int]], None]:
            what = f"{share.cpus} CPUs" + (" and a GPU" if share.gpus else "")
            if not quiet:
                click.echo(f"{share.workers} workers of {what} each; {plan.describe()}", err=True)
            if task.resume and not quiet:
                found = f"{resumed} images are in finished partitions, continuing" if resumed else "Nothing to resume"
                click.echo(found, err=True)
            advance = stack.enter_context(bar("Segmenting", images - resumed))
            failed = 0

            def done(counts: Mapping[str, int]) -> None:
                nonlocal failed
                failed += counts["failed"]
                advance(int(counts["images"]), failed=failed)

            return done

        def merging(images: int) -> Callable[[], object]:
            stack.close()
            return stack.enter_context(bar("Merging", images))

        try:
            run = infer_on_cluster(task, options, started, merging, _lost)
        except KeyboardInterrupt:
            click.echo("Finished partitions are kept; --resume continues from there", err=True)
            raise
    seconds = time.perf_counter() - began
    if not quiet and not run.already_finished:
        click.echo(
            f"{task.output}: {run.images} images, {run.rows_with_mask} masks, {run.failed} failed, "
            f"{(run.images - run.resumed) / seconds:.1f} images/s, start and merge included"
        )
    if run.failed:
        click.echo(f"{task.paths.failures} lists the failed images and the reasons", err=True)
        raise SystemExit(1)


def _lost(line: str) -> None:
    """Print an error and end the process, because calls to Ray would no longer return."""
    click.echo(printable(f"\nError: {line}"), err=True)
    if sys.stdout is not None:
        sys.stdout.flush()
    os._exit(2)
