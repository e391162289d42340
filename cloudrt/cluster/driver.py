"""The whole run on a cluster: list the images, divide them into partitions, segment them with Ray Data, and merge.

    inputs --list--> partitions --Ray Data: one actor per GPU or group of cores--> files of rows --merge--> submission

Everything that results depend on is chosen once: provider, batch size, threads, streams. One worker measures the
options that are not set, and every other worker must have the same identity, so the submission is byte-identical to
that of a single machine with this identity.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from cloudrt.cluster.checks import check_nodes
from cloudrt.cluster.execution import Done, run_partitions, settle
from cloudrt.cluster.listing import cut, list_images
from cloudrt.cluster.nodes import Share, connected, list_nodes, share_out
from cloudrt.cluster.panoramas import are_appended, checked, prepare_checks
from cloudrt.cluster.partitions import Counted, Partitions
from cloudrt.cluster.storage import Place, is_uri, open_place
from cloudrt.cluster.watch import watched
from cloudrt.cluster.worker import Job
from cloudrt.engines.plan import Plan
from cloudrt.images.image import ImageFile
from cloudrt.images.inputs import digest_sizes
from cloudrt.inference.identity import Identity
from cloudrt.inference.model_source import require_rules
from cloudrt.inference.outputs import write_failures, write_rows
from cloudrt.inference.submission import read_run_record, write_run_record
from cloudrt.inference.task import InferTask
from cloudrt.model.artifact import default_model, parse_artifact
from cloudrt.model.onnx_file import load_with_content
from cloudrt.system.files import locked
from cloudrt.system.paths import check_outputs

logger = logging.getLogger(__name__)

PARTITION = 1024
"""Default maximum number of images per partition, rounded up to whole batches."""
PANORAMAS = 16
"""Default maximum number of panoramas per partition."""
ROUNDS = 4
"""Default minimum number of partitions per worker, to balance load; rounding up to whole batches may leave fewer."""


@dataclass(frozen=True)
class ClusterRun:
    """Result of a run on a cluster.

    Parameters
    ----------
    images, failed, rows_with_mask
        Counts of the whole submission; the last two are 0 if `already_finished`.
    resumed
        Images that an earlier run had finished.
    share
        The workers.
    plan
        How they ran.
    already_finished
        Whether an earlier run had written the output, so that nothing was touched.
    """

    images: int
    failed: int
    rows_with_mask: int
    resumed: int
    share: Share
    plan: Plan
    already_finished: bool = False


@dataclass(frozen=True)
class ClusterOptions:
    """Address of the cluster, and location and format of the partitions.

    Parameters
    ----------
    address
        HOST:PORT of a cluster, "auto" for the cluster of this machine, or "local" to start Ray on this machine.
    partitions
        Folder or URI of the partitions; None uses OUTPUT.parts.
    partition_format, partition_size
        "parquet" or "csv", and the number of images per partition; 0 chooses it.
    endpoint
        URL of an S3-compatible store.
    """

    address: str = "local"
    partitions: str | None = None
    partition_format: str = "parquet"
    partition_size: int = 0
    endpoint: str | None = None


def infer_on_cluster(
    task: InferTask,
    options: ClusterOptions,
    started: Callable[[Plan, Share, int, int], Done],
    merging: Callable[[int], Callable[[], object]],
    lost: Callable[[str], object],
) -> ClusterRun:
    """Segment images on a cluster and write the submission.

    Parameters
    ----------
    task
        What to run, as on a single machine; `inputs` may also be URIs of folders or images.
    options
        Where to run it.
    started
        Called once with the plan, the workers, the number of images and how many of them are finished already; returns
        the function that is called with the counts of each partition.
    merging
        Called with the number of images; returns the function that is called for each image that is merged.
    lost
        Called with one line, from another thread, if the cluster is lost: must end the process.

    Raises
    ------
    CloudrtError
        The cluster, the images, the artifact or the outputs cannot be used, or workers would give different results.
        Finished partitions are kept for `resume`.
    ModuleNotFoundError, OSError
        A package that the output format needs is not installed; an output cannot be written.
    """
    model = task.model or default_model()
    loaded, data = load_with_content(model)
    artifact = parse_artifact(loaded, model)
    require_rules(artifact, model)
    images, stores, folders = list_images(
        [str(one) for one in task.inputs], task.sample, options.endpoint, artifact.labels
    )
    checks = prepare_checks(task, artifact, images)
    out = open_place(options.partitions or f"{task.output}.parts", options.endpoint)
    partitions = Partitions(out, options.partition_format, artifact.labels, placed=task.tiling is not None)
    overwrite = task.overwrite or are_appended(partitions, task)
    partitions.check(resume=task.resume, overwrite=overwrite)  # `begin` checks it again, but only after slow steps
    recorded = partitions.recorded() if task.resume else None
    local = [ImageFile(image.key, Path(image.path)) for image in images if image.store < 0]
    task.check(local, begun=recorded is not None and partitions.writes(task.output))
    if out.local:
        inputs: dict[str, Path | None] = {f"input {one}": Path(one) for one in task.inputs if not is_uri(str(one))}
        place = {"--partitions": Path(out.path)}
        check_outputs({}, inputs, folders=place, images=(image.path for image in local), overwrite=True)
    with _held(out):
        with connected(options.address), watched(lost):
            nodes = list_nodes()
            share = share_out(nodes, task.run.provider, task.run.threads)
            plan = recorded.plan() if recorded else None
            settled = plan if plan and plan.satisfies(task.run) else None
            job = Job(model.name, sha256(data).hexdigest(), task.run.changed(threads=share.cpus, devices=None), settled)
            job.keep_model(data)
            remote = [image for image in reversed(images) if image.store >= 0]
            firsts = {image.store: (stores[image.store], image.path) for image in remote}
            seen = [*folders, out.path] if out.local else folders
            check_nodes(nodes, share, seen, list(firsts.values()), job.keep_model, data)
            plan, identity = settle(job, share)
            least, most = (1, PANORAMAS) if task.tiling else (plan.batch_size, PARTITION)
            size = _partition_size(options, -(-len(images) // (ROUNDS * share.workers)), least, most, recorded)
            whole = replace(
                task.complete(identity),
                images=len(images),
                inputs=digest_sizes((image.key, image.size) for image in images),
                partition_size=size,
                partition_format=options.partition_format,
            )
            finished = partitions.begin(whole, resume=task.resume, overwrite=overwrite, output=task.output)
            parts = cut(images, size)
            todo = [number for number in range(len(parts)) if partitions.name(number) not in finished]
            # Without a record, the merge was interrupted; with another record, the output is that of another run.
            merged = task.output.exists() and task.paths.record.exists()
            if task.resume and not todo and merged and read_run_record(task.paths) == whole:
                logger.info("%s: already finished, nothing to do", task.output)
                return ClusterRun(len(images), 0, 0, len(images), share, plan, already_finished=True)
            resumed = len(images) - sum(len(parts[number]) for number in todo)
            done = started(plan, share, len(images), resumed)
            job = replace(
                job,
                plan=plan,
                identity=identity,
                stores=tuple(stores),
                out=out,
                form=options.partition_format,
                run=partitions.run,
                tiling=task.tiling,
            )
            run_partitions(job, parts, todo, share, done)
        # The folder is locked until merging is done; otherwise another run could replace the rows.
        records = checked(partitions.records(parts, whole), checks)
        counted = Counted(records, merging(len(images)))
        task.paths.record.unlink(missing_ok=True)
        write_rows(task.output, task.format, counted.records, artifact.labels, task.format_options())
        write_failures(task.paths.failures, lambda: counted.failures)
        write_run_record(task.paths, whole)
    return ClusterRun(len(images), len(counted.failures), counted.rows_with_mask, resumed, share, plan)


@contextmanager
def _held(out: Place) -> Iterator[None]:
    """Lock a folder of partitions against other runs; remove it if it stays empty."""
    if not out.local:
        yield
        return
    folder = Path(out.path)
    lock = folder / ".lock"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(lock, "wait for it, or give other --partitions"):
        try:
            yield
        finally:
            if {path.name for path in folder.iterdir()} == {lock.name}:
                lock.unlink()
                folder.rmdir()


def _partition_size(options: ClusterOptions, even: int, least: int, most: int, recorded: Identity | None) -> int:
    """Return the given or recorded size, else the smaller of `even` and `most`, rounded up to multiples of `least`."""
    if options.partition_size:
        return options.partition_size
    if recorded and recorded.partition_size:
        return recorded.partition_size
    return -(-min(most, even) // least) * least
