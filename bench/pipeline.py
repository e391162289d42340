"""The whole pipeline, compared with its ceiling and with peers that do the same work from files to CSV.

Each stage runs alone with all of its threads, then the whole pipeline, alternating with the peers. On a CPU the stages
share the cores, and the ceiling is the rate of cores that are never idle. With a GPU the ceiling is the rate of the
slower of decoding and the engine.

    CPU   ceiling = cores / CPU seconds per image of all stages alone
    GPU   ceiling = the lower of the rates of decoding alone and of the engine alone
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from cloudrt.masks.postprocess import apply_rules
from cloudrt.system.machine import usable_cpus

from .stages import REST, Timing
from .workload import Workload, load

STAGES = ("decode", "infer", "post-process")


@dataclass(frozen=True)
class PipelineTime:
    """Times of the stages, the whole pipeline and its peers.

    Parameters
    ----------
    stages
        Stage -> seconds per image, alone with all of its threads.
    whole
        Seconds per image from files to CSV.
    cpu_seconds
        Stage or "whole" -> CPU seconds per image, of all threads.
    cores
        Number of cores that the stages share; 0 with an engine on a GPU.
    peers
        Peer -> seconds per image from files to CSV.
    """

    stages: dict[str, Timing]
    whole: Timing
    cpu_seconds: dict[str, Timing]
    cores: int
    peers: dict[str, Timing]

    @property
    def share(self) -> float:
        """Share of the ceiling that the whole pipeline reaches: the median over the rounds."""
        used = self.cpu_seconds if self.cores else self.stages
        pairs = zip(*(used[name].seconds for name in STAGES), self.whole.seconds, strict=True)
        shares = [(sum(alone) / self.cores if self.cores else max(alone[:2])) / whole for *alone, whole in pairs]
        return float(np.median(shares))

    @property
    def bottleneck(self) -> str:
        """The stage that takes most CPU time or, with a GPU, most wall time."""
        used = self.cpu_seconds if self.cores else self.stages
        return max(STAGES, key=lambda name: used[name].median)

    def ratio(self, peer: str) -> float:
        """Speed of the whole pipeline relative to a peer: the median over the rounds."""
        pairs = zip(self.peers[peer].seconds, self.whole.seconds, strict=True)
        return float(np.median([theirs / ours for theirs, ours in pairs]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "stages": {name: timing.to_dict() for name, timing in self.stages.items()},
            "whole": self.whole.to_dict(),
            "cpu_seconds_per_image": {name: timing.median for name, timing in self.cpu_seconds.items()},
            "cores": self.cores,
            "share_of_ceiling": self.share,
            "bottleneck": self.bottleneck,
            "peers": {name: {**timing.to_dict(), "ratio": self.ratio(name)} for name, timing in self.peers.items()},
        }


def measure_pipeline(
    work: Workload,
    whole: Callable[[], object],
    others: Mapping[str, Callable[[], object]],
    repeat: int,
    advance: Callable[[], object],
) -> PipelineTime:
    """Time the stages alone, the whole pipeline and the peers alternately, `repeat` times after a warm-up round.

    Parameters
    ----------
    work
        The model and the images.
    whole, others
        cloudrt and the peers, from files to CSV.
    repeat
        Number of timed rounds.
    advance
        Called after each of the `rounds(others, repeat)` passes.
    """
    rules, segmenter = work.rules, work.segmenter
    step = segmenter.batch_size
    batches = [work.loaded[begin : begin + step] for begin in range(0, len(work.loaded), step)]
    with (
        ThreadPoolExecutor(segmenter.threads) as threads,
        ThreadPoolExecutor(segmenter.pool.slots) as engines,
    ):
        ways: dict[str, Callable[[], object]] = {
            "decode": lambda: list(threads.map(lambda file: load(segmenter, file), work.files)),
            "infer": lambda: list(engines.map(segmenter.pool.run, batches)),
            "post-process": lambda: list(threads.map(lambda pair: apply_rules(pair[0], rules, pair[1]), work.maps)),
            "whole": whole,
            **others,
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        used: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeat + 1):
            for name, way in ways.items():
                time.sleep(REST)
                began, busy = time.perf_counter(), time.process_time()
                way()
                seconds[name].append((time.perf_counter() - began) / len(work.files))
                used[name].append((time.process_time() - busy) / len(work.files))
                advance()
    timings = {name: Timing(tuple(values[1:])) for name, values in seconds.items()}
    return PipelineTime(
        stages={name: timings[name] for name in STAGES},
        whole=timings["whole"],
        cpu_seconds={name: Timing(tuple(used[name][1:])) for name in (*STAGES, "whole")},
        cores=0 if work.on_gpu else usable_cpus(),
        peers={name: timings[name] for name in others},
    )


def rounds(others: Mapping[str, Callable[[], object]], repeat: int) -> int:
    """Return the number of passes that `measure_pipeline` makes."""
    return (repeat + 1) * (len(STAGES) + 1 + len(others))
