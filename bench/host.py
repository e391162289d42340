"""Overhead of the pipeline on the host, which limits the rate when a GPU runs the network.

    hand-over      decode, engine and post-processing take no time: images/s of passing work between threads
    post-process   decode and engine take no time: rate relative to post-processing alone, on the same cores
    overlap        copying, computing and post-processing a batch take equally long and use no core, on two streams:
                   rate of the three together relative to one of them

A stand-in for the engine returns the model's maps; see `stand_ins`. Post-processing cycles through the maps of `MAPS`
images, more than the CPU caches hold, because the output of a real engine is not in the caches either. The measurements
alternate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle, repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloudrt.images.image import ImageFile
from cloudrt.inference.pipeline import Segmenter
from cloudrt.masks.postprocess import Maps, postprocess_batch
from cloudrt.masks.rule import Rule

from .stages import Timing
from .stand_ins import Instant, Staged, StandIn, parts
from .workload import Workload

BATCHES = (8, 16, 32, 64, 128, 256)
SHARED = (8, 32, 128)
"""Batch sizes at which post-processing is measured."""
MAPS = 256
"""Images whose maps post-processing reads in turn: 188 MB at 350x525 and four classes."""
BLOCK_S = 0.5
"""Seconds per timed pass."""
STAGE_S = 0.01
"""Seconds per batch of each stage, where they overlap."""


@dataclass(frozen=True)
class Host:
    """Result of `measure_host`.

    Parameters
    ----------
    handover
        Batch size -> seconds per image, if no stage takes time.
    alone, whole
        Batch size -> seconds per image of post-processing alone, and of the pipeline around it.
    overlap
        Seconds per batch of three stages of `STAGE_S` each.
    threads
        Number of threads for post-processing, alone and in the pipeline.
    """

    handover: dict[int, Timing]
    alone: dict[int, Timing]
    whole: dict[int, Timing]
    overlap: Timing
    threads: int

    @property
    def evenness(self) -> float:
        """Rate at the slowest batch size relative to the fastest."""
        medians = [timing.median for timing in self.handover.values()]
        return min(medians) / max(medians)

    def share(self, batch_size: int) -> float:
        """Rate of the pipeline relative to post-processing alone: the median over the rounds."""
        pairs = zip(self.alone[batch_size].seconds, self.whole[batch_size].seconds, strict=True)
        return float(np.median([alone / whole for alone, whole in pairs]))

    @property
    def overlap_share(self) -> float:
        """Rate of the three stages together relative to one of them."""
        return STAGE_S / self.overlap.median

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; seconds are per image, those of the overlap per batch."""
        shares = {
            str(size): {
                "alone": self.alone[size].to_dict(),
                "pipeline": self.whole[size].to_dict(),
                "share": self.share(size),
            }
            for size in self.alone
        }
        return {
            "threads": self.threads,
            "handover": {str(size): timing.to_dict() for size, timing in self.handover.items()},
            "evenness": self.evenness,
            "postprocess": shares,
            "overlap": {"stage_s": STAGE_S, "batch": self.overlap.to_dict(), "share": self.overlap_share},
        }


def measure_host(work: Workload, rounds: int, advance: Callable[[], object]) -> Host:
    """Time everything in `rounds` alternating rounds, after a warm-up round.

    `advance` is called after each of the `passes(rounds)` passes.
    """
    handover: dict[int, list[float]] = {size: [] for size in BATCHES}
    alone: dict[int, list[float]] = {size: [] for size in SHARED}
    whole: dict[int, list[float]] = {size: [] for size in SHARED}
    overlap: list[float] = []
    levels, presence = stack(work, MAPS)
    with StandIn(work.segmenter) as ours:
        for number in range(rounds + 1):
            for size in BATCHES[:: 1 if number % 2 else -1]:  # forwards and backwards: no size is always the first
                ours.use(Instant(ours.artifact, size), no_masks)
                handover[size].append(time_pipeline(ours))
                advance()
            for size in SHARED:
                alone[size].append(time_postprocessing(levels, presence, work.rules, size, ours.threads))
                advance()
                ours.use(Instant(ours.artifact, size, levels, presence), None)
                whole[size].append(time_pipeline(ours))
                advance()
            overlapping(ours)
            overlap.append(ours.batch_size * time_pipeline(ours))
            advance()
    return Host(
        _timings(handover), _timings(alone), _timings(whole), overlap=Timing(tuple(overlap[1:])), threads=ours.threads
    )


def _timings(seconds: dict[int, list[float]]) -> dict[int, Timing]:
    """Return the rounds that count: all but the first."""
    return {size: Timing(tuple(each[1:])) for size, each in seconds.items()}


def passes(rounds: int) -> int:
    """Return the number of passes of `measure_host`."""
    return (rounds + 1) * (len(BATCHES) + 2 * len(SHARED) + 1)


def no_masks(batches: Sequence[Maps]) -> list[str]:
    """Return an empty RLE text for each map of the batches."""
    return [""] * sum(len(levels) * levels.shape[1] for levels, _ in batches)


def overlapping(ours: StandIn, batch_size: int = 32) -> None:
    """Let copying, computing and post-processing a batch take `STAGE_S` each."""
    threads = min(ours.threads, batch_size)

    def texts(batches: Sequence[Maps]) -> list[str]:
        images = sum(len(levels) for levels, _ in batches)
        time.sleep(STAGE_S * images * threads / batch_size)  # all threads together finish a batch in STAGE_S
        return no_masks(batches)

    ours.use(Staged(ours.artifact, batch_size, STAGE_S), texts)


def time_pipeline(ours: Segmenter) -> float:
    """Return seconds per image over `BLOCK_S`, after a warm-up."""
    before, began, first = 0, 0.0, time.perf_counter()
    size = ours.batch_size
    with closing(ours.predict(repeat(ImageFile("a.jpg", Path("a.jpg"))))) as results:  # as cloudrt-infer does
        for count, _ in enumerate(results, 1):
            if count % size:
                continue
            now = time.perf_counter()
            if not before and now - first > BLOCK_S / 5:
                before, began = count, now
            if before and now - began > BLOCK_S:
                return (now - began) / (count - before)
    raise AssertionError("the inputs are endless")


def time_postprocessing(
    levels: NDArray[np.uint8],
    presence: NDArray[np.uint8] | None,
    rules: Sequence[Rule],
    batch_size: int,
    threads: int,
) -> float:
    """Return seconds per image if each of `threads` threads post-processes its part of every batch."""
    shares = parts(levels, presence, max(1, batch_size // threads))

    def loop(number: int) -> int:
        count = 0
        for some, certain in cycle(shares[number::threads]):
            count += len(postprocess_batch(some, rules, certain))
            if time.perf_counter() - began > BLOCK_S:
                break
        return count

    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        count = sum(pool.map(loop, range(threads)))
        return (time.perf_counter() - began) / count


def stack(work: Workload, count: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Return `count` maps and presence levels of the model: those of the images, repeated."""
    chosen = [work.maps[number % len(work.maps)] for number in range(count)]
    presence = [certain for _, certain in chosen if certain is not None]
    return np.stack([levels for levels, _ in chosen]), np.stack(presence) if presence else None
