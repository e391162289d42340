"""What a cluster costs and gains: overhead per image beside the plain pipeline, and throughput from 1 to 16 workers.

    python -m cloudrt.bench.studies.cluster overhead IMAGES -o cpu-cluster-overhead.json
    python -m cloudrt.bench.studies.cluster scaling -o cpu-cluster-scaling.json

Overhead: the same images, model, provider, batch and cores, in turns, from files to the merged CSV; both must give the
same bytes. The clock begins when the engine is open and has run a few images; what starting takes is told apart.

Scaling: engines that sleep, so that many fit on few cores: each batch takes a fixed time. The clock begins when all
workers are there. What is measured is what Ray, the ledger, the files of rows and the driver cost, not a network.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
from cloudrt.bench.machine import machine, versions

from cloudrt.cluster.driver import run_partitions
from cloudrt.cluster.nodes import Share, connected, prepare
from cloudrt.cluster.partitions import Image, Partitions, cut
from cloudrt.cluster.storage import open_place
from cloudrt.cluster.worker import Job
from cloudrt.images.decoding import Input
from cloudrt.images.headers import MAX_PIXELS
from cloudrt.images.image import ImageFile, find_images
from cloudrt.inference.outputs import write_csv
from cloudrt.inference.pipeline import Segmenter
from cloudrt.inference.results import Result
from cloudrt.inference.submission import open_submission
from cloudrt.labels import CLOUDS, Labels
from cloudrt.system.files import sha256
from cloudrt.system.versions import package_versions

WORKERS = (1, 2, 4, 8, 16)
WARM = 8
"""Images before the clock begins."""


@dataclass(frozen=True)
class Simulated:
    """A predictor that sleeps `seconds` a batch, and finds nothing."""

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

    def identity(self) -> dict[str, str | int]:
        """Nothing hangs on it."""
        return {}


class StartBarrier:
    """An actor that counts the workers in, and knows when the last of them came."""

    def __init__(self, expected: int) -> None:
        self._expected, self._here, self._opened = expected, 0, 0.0

    def enter(self) -> None:
        """One more is here."""
        self._here += 1
        if self._here == self._expected:
            self._opened = time.time()

    def opened(self) -> float:
        """Return when all were here; 0 before."""
        return self._opened


@dataclass(frozen=True)
class SimulatedJob(Job):
    """A job of simulated engines, which begin together."""

    seconds: float = 0.0
    gate: Any = None

    @property
    def model(self) -> Path:
        """It has none: any file that is there."""
        return Path(__file__)

    def open(self) -> Simulated:
        """Return the predictor once all workers are there."""
        import ray

        ray.get(self.gate.enter.remote())
        while not ray.get(self.gate.opened.remote()):
            time.sleep(0.05)
        return Simulated(self.batch_size, self.seconds)


def measure_scaling(
    counts: Sequence[int], batch: int, seconds: float, batches: int, rounds: int, tell: Callable[[str], object]
) -> dict[str, Any]:
    """Return images per second of each number of workers, and how it compares with as many times one worker's.

    Parameters
    ----------
    batch, seconds, batches, rounds
        Images a batch, seconds that it takes, batches a partition, partitions a worker.
    """
    import ray

    rates: dict[int, float] = {}
    for workers in counts:
        parts = [
            [Image(f"{number}-{i}.jpg", -1, "", 0) for i in range(batch * batches)]
            for number in range(workers * rounds)
        ]
        with TemporaryDirectory() as folder:
            gate = ray.remote(num_cpus=0)(StartBarrier).remote(workers)
            job = SimulatedJob(
                "simulated", "", 1, MAX_PIXELS, batch_size=batch, seconds=seconds, gate=gate, out=open_place(folder)
            )
            run_partitions(job, parts, range(len(parts)), Share(workers, 1, 0), lambda _: None)
            rates[workers] = sum(map(len, parts)) / (time.time() - ray.get(gate.opened.remote()))
            ray.kill(gate)
        tell(f"{workers} workers: {rates[workers]:.1f} images/s")
    first = rates[counts[0]] / counts[0]
    return {
        "batch": batch,
        "seconds_per_batch": seconds,
        "images_per_partition": batch * batches,
        "images_per_s": rates,
        "share_of_linear": {n: rate / (n * first) for n, rate in rates.items()},
        "share_of_the_engines": {n: rate / (n * batch / seconds) for n, rate in rates.items()},
    }


def measure_overhead(
    images: Sequence[Image],
    model: Path,
    provider: str,
    batch: int,
    threads: int,
    rounds: int,
    tell: Callable[[str], object],
) -> dict[str, Any]:
    """Return seconds per image of the plain pipeline and of one worker of the same cores, in turns.

    Raises
    ------
    AssertionError
        Their submissions differ.
    """
    seconds: dict[str, list[float]] = {"plain": [], "cluster": []}
    starts: list[float] = []
    with TemporaryDirectory() as folder:
        for number in range(rounds):
            plain, spread = Path(folder, f"{number}.csv"), Path(folder, f"{number}-cluster.csv")
            for name in ("plain", "cluster") if number % 2 == 0 else ("cluster", "plain"):
                if name == "plain":
                    found = _plain(images, model, provider, batch, threads, plain)
                else:
                    found, start = _spread(images, model, provider, batch, threads, spread)
                    starts.append(start)
                seconds[name].append(found / len(images))
                tell(f"{name}: {len(images) / found:.2f} images/s")
            assert plain.read_bytes() == spread.read_bytes()
    pairs = [theirs / ours - 1 for theirs, ours in zip(seconds["cluster"], seconds["plain"], strict=True)]
    return {
        "images": len(images),
        "distinct_images": len({image.path for image in images}),
        "provider": provider,
        "batch": batch,
        "threads": threads,
        "seconds_per_image": seconds,
        "overhead_of_each_round": pairs,
        "overhead": float(np.median(pairs)),
        "seconds_to_start_the_worker": starts,
        "same_bytes": True,
    }


def _plain(images: Sequence[Image], model: Path, provider: str, batch: int, threads: int, output: Path) -> float:
    files = [ImageFile(image.key, Path(image.path)) for image in images]
    with Segmenter(model, provider=provider, batch_size=batch, threads=threads) as segmenter:
        list(segmenter.predict(files[:WARM]))
        began = time.perf_counter()
        with open_submission(output, segmenter.labels) as submission:
            for result in segmenter.predict(files):
                submission.add(result.image, result.rle, result.error, result.batch, result.batch_size)
        return time.perf_counter() - began


def _spread(
    images: Sequence[Image], model: Path, provider: str, batch: int, threads: int, output: Path
) -> tuple[float, float]:
    """Return seconds from the first partition, which warms up, to the CSV; and those before."""
    job = Job(model.name, sha256(model), threads, MAX_PIXELS, provider, batch)
    job.keep_model(model.read_bytes())
    warm = [replace(image, key=f"warm-{number}") for number, image in enumerate(images[:WARM])]
    parts = [warm, *cut(images, -(-len(images) // 4 // batch) * batch)]
    place = open_place(f"{output}.parts")
    times: list[float] = []

    def done(_: Mapping[str, int]) -> None:
        times.append(time.perf_counter())

    began = time.perf_counter()
    run_partitions(replace(job, out=place), parts, range(len(parts)), Share(1, threads, 0), done)
    records = Partitions(place, "parquet", CLOUDS).records(parts)
    write_csv(output, lambda: islice(records(), WARM, None), CLOUDS)
    return time.perf_counter() - times[0], times[0] - began


@click.group()
def main() -> None:
    """Measure what `cloudrt-infer --cluster` costs and gains."""


@main.command()
@click.argument("folder", metavar="IMAGES", type=click.Path(path_type=Path, exists=True))
@click.option("--model", type=click.Path(path_type=Path, exists=True), help="The shipped one by default.")
@click.option("--count", type=click.IntRange(2 * WARM), default=2000, show_default=True)
@click.option("--provider", default="cpu", show_default=True)
@click.option("--batch-size", default=4, show_default=True)
@click.option("--rounds", default=2, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def overhead(
    folder: Path, model: Path | None, count: int, provider: str, batch_size: int, rounds: int, output: Path | None
) -> None:
    """Time COUNT of IMAGES, repeated as often as it takes, in the plain pipeline and in one worker, in turns."""
    from cloudrt.model.artifact import default_model
    from cloudrt.system.machine import usable_cpus

    files = islice(cycle(find_images(folder)), count)
    images = [Image(f"{number:06}-{file.key}", -1, str(file.path.absolute()), 0) for number, file in enumerate(files)]
    with _ray(usable_cpus()):
        found = measure_overhead(
            images, model or default_model(), provider, batch_size, usable_cpus(), rounds, click.echo
        )
    _tell(found, output)


@main.command()
@click.option("--batch-size", default=4, show_default=True)
@click.option("--seconds", default=0.1, show_default=True, help="That a batch takes.")
@click.option("--batches", default=20, show_default=True, help="In a partition.")
@click.option("--rounds", default=6, show_default=True, help="Partitions a worker.")
@click.option("-o", "--output", type=click.Path(path_type=Path))
def scaling(batch_size: int, seconds: float, batches: int, rounds: int, output: Path | None) -> None:
    """Time 1 to 16 workers whose engines sleep."""
    with _ray(max(WORKERS)):
        found = measure_scaling(WORKERS, batch_size, seconds, batches, rounds, click.echo)
    _tell(found, output)


def _ray(cpus: int) -> Any:
    """Start Ray on this machine, with as many CPUs to give away as is said."""
    import ray

    prepare()
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    return connected("local")


def _tell(found: dict[str, Any], output: Path | None) -> None:
    libraries = versions() | package_versions("ray", "pyarrow")
    text = json.dumps({"machine": machine(), "versions": libraries, **found}, indent=2)
    click.echo(text)
    if output:
        output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
