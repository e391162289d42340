"""Run partitions with Ray: one worker measures the plan, then Ray Data distributes the partitions to all workers.

Ray Data gives each worker its next partition when the worker is ready, replaces workers that die and runs their
partitions again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from cloudrt.cluster.isolation import Ledger
from cloudrt.cluster.listing import ListedImage, pack
from cloudrt.cluster.nodes import Share, unwrapped
from cloudrt.cluster.worker import Job, Worker
from cloudrt.engines.plan import Plan
from cloudrt.inference.identity import Identity

logger = logging.getLogger(__name__)

Done = Callable[[Mapping[str, int]], object]
"""Called with the counts of each finished partition: number, images, failed."""


def run_partitions(
    job: Job, parts: Sequence[Sequence[ListedImage]], todo: Sequence[int], share: Share, done: Done
) -> None:
    """Run the partitions with the numbers `todo` on all workers, or fewer if there are fewer partitions.

    Raises
    ------
    ClusterError
        A worker or Ray raised an error.
    """
    if not todo:
        return
    import ray
    import ray.data
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    ledger = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Ledger)  # a restarted one begins empty
    ledger = ledger.options(scheduling_strategy=here).remote(job.model.read_bytes())
    rows = [{"number": number, "images": pack(parts[number])} for number in todo]
    workers = min(share.workers, len(todo))
    with _quiet():
        data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Worker,
            fn_constructor_args=(job, ledger),
            batch_size=1,
            batch_format="numpy",
            num_cpus=share.cpus,
            num_gpus=share.gpus or None,
            concurrency=workers,
        )
        try:
            # With prefetching, a partition would be reported only when the next one is finished.
            for found in data.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
                for values in zip(*found.values(), strict=True):
                    done({name: int(value) for name, value in zip(found, values, strict=True)})
        except (RayError, RuntimeError) as error:
            raise unwrapped(error) from error
        finally:
            ray.kill(ledger)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Ray's progress bars and plans: the caller shows its own progress."""
    from ray.data import DataContext

    context = DataContext.get_current()
    before = context.enable_progress_bars, context.print_on_execution_start
    context.enable_progress_bars, context.print_on_execution_start = False, False
    levels = {name: logging.getLogger(name).level for name in ("ray", "ray.data")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def settle(job: Job, share: Share) -> tuple[Plan, Identity]:
    """Open the artifact on one worker; return its plan and its identity.

    Raises
    ------
    ClusterError
        The artifact cannot be opened there, or the worker is lost.
    """
    import ray
    from ray.exceptions import RayError

    pending = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus)(_open_once).remote(job)
    if not ray.wait([pending], timeout=30)[0]:
        logger.info("Waiting for the cluster: a worker needs %d free CPUs and %d free GPUs", share.cpus, share.gpus)
    try:
        settled: tuple[Plan, Identity] = ray.get(pending)
    except RayError as error:
        raise unwrapped(error) from error
    return settled


def _open_once(job: Job) -> tuple[Plan, Identity]:
    from cloudrt.inference.pipeline import Segmenter

    segmenter = job.open()
    assert isinstance(segmenter, Segmenter)
    try:
        return segmenter.plan, segmenter.identity()
    finally:
        segmenter.close()
