"""Overhead of a cluster per image, and throughput with 1 to 16 workers.

    python -m cloudrt.bench.studies.cluster overhead IMAGES -o cpu-cluster-overhead.json
    python -m cloudrt.bench.studies.cluster scaling -o cpu-cluster-scaling.json

Overhead: plain runs and runs on a cluster of one worker alternate, with the same images, model, provider, batch and
cores, from files to the merged CSV; both must give the same bytes. The clock starts when the engine is open and has
processed a few images; the time to start the worker is reported separately.

Scaling: the engines sleep for a fixed time per batch, so that many fit on few cores. The clock starts when all workers
are ready. This measures the cost of Ray, the ledger, the files of rows and the driver, not of a network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

from cloudrt.cluster.execution import run_partitions
from cloudrt.cluster.listing import ListedImage, cut
from cloudrt.cluster.nodes import Share, connected, prepare
from cloudrt.cluster.partitions import Partitions
from cloudrt.cluster.storage import open_place
from cloudrt.cluster.worker import Job
from cloudrt.images.decoding import Input
from cloudrt.images.image import ImageFile, find_images
from cloudrt.inference.identity import Identity
from cloudrt.inference.outputs import write_csv
from cloudrt.inference.pipeline import Segmenter
from cloudrt.inference.results import Result
from cloudrt.inference.run import write_submission
from cloudrt.inference.task import InferTask
from cloudrt.labels import CLOUDS, Labels
from cloudrt.options import RunOptions
from cloudrt.system.files import sha256

from .results import save

WORKERS = (1, 2, 4, 8, 16)
WARM = 8
"""Number of images before the clock starts."""


@dataclass(frozen=True)
class SleepingPredictor:
    """A predictor that sleeps `seconds` per batch and returns empty results."""

    batch_size: int
    seconds: float
    labels: Labels = CLOUDS

    def predict(self, inputs: Iterable[Input]) -> Iterator[Result]:
        """Yield an empty result for each input."""
        for number, one in enumerate(inputs):
            if number % self.batch_size == 0:
                time.sleep(self.seconds)
            key = one.key if isinstance(one, ImageFile) else str(number)
            yield Result(key, dict.fromkeys(self.labels.classes, ""), None, self.labels)

    def identity(self) -> Identity:
        """Never called, because a job without an identity accepts any worker."""
        raise AssertionError("the identity of a stand-in is not asked for")


class Barrier:
    """An actor that counts the workers, and records when the last one was ready."""

    def __init__(self, expected: int) -> None:
        self._expected, self._ready, self._opened = expected, 0, 0.0

    def enter(self) -> None:
        """Count one worker."""
        self._ready += 1
        if self._ready == self._expected:
            self._opened = time.time()

    def opened(self) -> float:
        """Return when the last worker was ready; 0 before."""
        return self._opened


@dataclass(frozen=True)
class SleepingJob(Job):
    """A job of sleeping engines that start together."""

    seconds: float = 0.0
    barrier: Any = None

    @property
    def model(self) -> Path:
        """Any existing file: there is no artifact."""
        return Path(__file__)

    def open(self) -> SleepingPredictor:
        """Return the predictor once all workers are ready."""
        import ray

        ray.get(self.barrier.enter.remote())
        while not ray.get(self.barrier.opened.remote()):
            time.sleep(0.05)
        return SleepingPredictor(self.options.batch_size, self.seconds)


@dataclass(frozen=True)
class SleepingLoad:
    """Images per batch, seconds per batch, batches per partition, and partitions per worker."""

    batch: int
    seconds: float
    batches: int
    rounds: int


def measure_scaling(counts: Sequence[int], load: SleepingLoad, tell: Callable[[str], object]) -> dict[str, Any]:
    """Return images per second by number of workers, and their ratios to linear scaling and to the engines alone."""
    import ray

    rates: dict[int, float] = {}
    for workers in counts:
        parts = [
            [ListedImage(f"{number}-{i}.jpg", -1, "", 0) for i in range(load.batch * load.batches)]
            for number in range(workers * load.rounds)
        ]
        with TemporaryDirectory() as folder:
            barrier = ray.remote(num_cpus=0)(Barrier).remote(workers)
            options = RunOptions(batch_size=load.batch, threads=1)
            job = SleepingJob("sleeping", "", options, out=open_place(folder), seconds=load.seconds, barrier=barrier)
            run_partitions(job, parts, range(len(parts)), Share(workers, 1, 0), lambda _: None)
            rates[workers] = sum(map(len, parts)) / (time.time() - ray.get(barrier.opened.remote()))
            ray.kill(barrier)
        tell(f"{workers} workers: {rates[workers]:.1f} images/s")
    first = rates[counts[0]] / counts[0]
    return {
        "batch": load.batch,
        "seconds_per_batch": load.seconds,
        "images_per_partition": load.batch * load.batches,
        "images_per_s": rates,
        "share_of_linear": {n: rate / (n * first) for n, rate in rates.items()},
        "share_of_the_engines": {n: rate / (n * load.batch / load.seconds) for n, rate in rates.items()},
    }


def measure_overhead(
    images: Sequence[ListedImage], model: Path, options: RunOptions, rounds: int, tell: Callable[[str], object]
) -> dict[str, Any]:
    """Return seconds per image of plain runs and of one worker with the same cores, alternating.

    Parameters
    ----------
    images
        Local images.
    model
        The artifact.
    options
        Provider, batch size and threads of both.
    rounds
        Number of pairs of runs.
    tell
        Called with one line per run.

    Raises
    ------
    AssertionError
        The submissions differ.
    """
    seconds: dict[str, list[float]] = {"plain": [], "cluster": []}
    starts: list[float] = []
    with TemporaryDirectory() as folder:
        for number in range(rounds):
            plain, spread = Path(folder, f"{number}.csv"), Path(folder, f"{number}-cluster.csv")
            for name in ("plain", "cluster") if number % 2 == 0 else ("cluster", "plain"):
                if name == "plain":
                    found = _run_plain(images, model, options, plain)
                else:
                    found, start = _run_cluster(images, model, options, spread)
                    starts.append(start)
                seconds[name].append(found / len(images))
                tell(f"{name}: {len(images) / found:.2f} images/s")
            assert plain.read_bytes() == spread.read_bytes()
    pairs = [theirs / ours - 1 for theirs, ours in zip(seconds["cluster"], seconds["plain"], strict=True)]
    return {
        "images": len(images),
        "distinct_images": len({image.path for image in images}),
        "provider": options.provider,
        "batch": options.batch_size,
        "threads": options.threads,
        "seconds_per_image": seconds,
        "overhead_of_each_round": pairs,
        "overhead": float(np.median(pairs)),
        "seconds_to_start_the_worker": starts,
        "same_bytes": True,
    }


def _run_plain(images: Sequence[ListedImage], model: Path, options: RunOptions, output: Path) -> float:
    files = [ImageFile(image.key, Path(image.path)) for image in images]
    with Segmenter(model, options) as segmenter:
        list(segmenter.predict(files[:WARM]))
        began = time.perf_counter()
        write_submission(segmenter, files, InferTask((), output))
        return time.perf_counter() - began


def _run_cluster(images: Sequence[ListedImage], model: Path, options: RunOptions, output: Path) -> tuple[float, float]:
    """Return the seconds from the end of the warm-up (the first partition) to the merged CSV, and those before it."""
    place = open_place(f"{output}.parts")
    job = Job(model.name, sha256(model), options, out=place)
    job.keep_model(model.read_bytes())
    warm = [replace(image, key=f"warm-{number}") for number, image in enumerate(images[:WARM])]
    batch = options.batch_size
    parts = [warm, *cut(images, -(-len(images) // 4 // batch) * batch)]
    times: list[float] = []

    def done(_: Mapping[str, int]) -> None:
        times.append(time.perf_counter())

    began = time.perf_counter()
    run_partitions(job, parts, range(len(parts)), Share(1, options.threads, 0), done)
    records = Partitions(place, "parquet", CLOUDS).records(parts)
    write_csv(output, lambda: islice(records(), WARM, None), CLOUDS)
    return time.perf_counter() - times[0], times[0] - began


@click.group()
def main() -> None:
    """Measure overhead and scaling of `cloudrt-infer --cluster`."""


@main.command()
@click.argument("folder", metavar="IMAGES", type=click.Path(path_type=Path, exists=True))
@click.option("--model", type=click.Path(path_type=Path, exists=True), help="Default: the model that ships.")
@click.option("--count", type=click.IntRange(2 * WARM), default=2000, show_default=True)
@click.option("--provider", default="cpu", show_default=True)
@click.option("--batch-size", default=4, show_default=True)
@click.option("--rounds", default=2, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def overhead(
    folder: Path, model: Path | None, count: int, provider: str, batch_size: int, rounds: int, output: Path | None
) -> None:
    """Time COUNT images, IMAGES repeated as needed, in plain runs and with one worker, alternating."""
    from cloudrt.model.artifact import default_model
    from cloudrt.system.machine import usable_cpus

    files = enumerate(islice(cycle(find_images(folder)), count))
    images = [ListedImage(f"{number:06}-{file.key}", -1, str(file.path.absolute()), 0) for number, file in files]
    options = RunOptions(provider=provider, batch_size=batch_size, threads=usable_cpus())
    with _ray(options.threads):
        found = measure_overhead(images, model or default_model(), options, rounds, click.echo)
    save(found, output, "ray", "pyarrow")


@main.command()
@click.option("--batch-size", default=4, show_default=True)
@click.option("--seconds", default=0.1, show_default=True, help="Seconds per batch.")
@click.option("--batches", default=20, show_default=True, help="Batches per partition.")
@click.option("--rounds", default=6, show_default=True, help="Partitions per worker.")
@click.option("-o", "--output", type=click.Path(path_type=Path))
def scaling(batch_size: int, seconds: float, batches: int, rounds: int, output: Path | None) -> None:
    """Time 1 to 16 workers whose engines sleep."""
    with _ray(max(WORKERS)):
        found = measure_scaling(WORKERS, SleepingLoad(batch_size, seconds, batches, rounds), click.echo)
    save(found, output, "ray", "pyarrow")


def _ray(cpus: int) -> Any:
    """Start Ray on this machine with the given number of CPUs."""
    import ray

    prepare()
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    return connected("local")


if __name__ == "__main__":
    main()
