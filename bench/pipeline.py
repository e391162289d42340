"""The whole pipeline beside what its stages allow, and beside peers that do the same work from files to CSV.

Each stage runs alone with all of its threads, then all of them together, in turns. On a CPU the stages share the
cores, and the ceiling is what the cores could do if none ever waited; with a GPU, the slower of decoding and the engine
is the limit.

    CPU   ceiling = cores / processor seconds per image of all stages alone
    GPU   ceiling = the lesser of decode alone and engine alone
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cloudrt.images.image import Image, ImageFile, load_image
from cloudrt.inference.pipeline import Segmenter
from cloudrt.labels import Grid, Labels
from cloudrt.masks.postprocess import Rule, apply_rules
from cloudrt.system.machine import usable_cpus

from . import notebook, peers
from .agreement import Maps
from .stages import REST, Timing

STAGES = ("decode", "infer", "post-process")


@dataclass(frozen=True)
class PipelineTime:
    """What a run of `measure_pipeline` found.

    Parameters
    ----------
    stages
        Stage -> seconds per image, alone with all of its threads.
    whole
        Seconds per image from files to CSV.
    cpu_seconds
        Stage -> processor seconds per image, of all threads.
    cores
        How many the stages share; 0 where the engine has a GPU.
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
        """The part of the ceiling that the whole reaches: the median over the rounds."""
        used = self.cpu_seconds if self.cores else self.stages
        pairs = zip(*(used[name].seconds for name in STAGES), self.whole.seconds, strict=True)
        shares = [(sum(alone) / self.cores if self.cores else max(alone[:2])) / whole for *alone, whole in pairs]
        return float(np.median(shares))

    @property
    def bottleneck(self) -> str:
        """The stage that takes most: of the processors' time, or, with a GPU, by the clock."""
        used = self.cpu_seconds if self.cores else self.stages
        return max(STAGES, key=lambda name: used[name].median)

    def ratio(self, peer: str) -> float:
        """How many times as fast as a peer the whole is: the median over the rounds."""
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
    segmenter: Segmenter,
    files: Sequence[ImageFile],
    loaded: Sequence[Image],
    maps: Maps,
    whole: Callable[[], object],
    others: Mapping[str, Callable[[], object]],
    repeat: int,
    advance: Callable[[], object],
) -> PipelineTime:
    """Time the stages alone, the whole and the peers in turns, `repeat` times after a round that does not count.

    Parameters
    ----------
    files, loaded, maps
        The images, what decoding makes of them, and what the network says of them.
    whole, others
        Ours and the peers, from files to CSV.
    advance
        Called after each of the `rounds(others, repeat)` passes.
    """
    size, rules = segmenter.artifact.input_size, segmenter.artifact.rules
    batches = [loaded[begin : begin + segmenter.batch_size] for begin in range(0, len(loaded), segmenter.batch_size)]
    with (
        ThreadPoolExecutor(segmenter.threads) as threads,
        ThreadPoolExecutor(segmenter.pool.slots) as engines,
    ):
        ways: dict[str, Callable[[], object]] = {
            "decode": lambda: list(threads.map(lambda file: load_image(file.path, size), files)),
            "infer": lambda: list(engines.map(segmenter.pool.run, batches)),
            "post-process": lambda: list(threads.map(lambda pair: apply_rules(pair[0], rules, pair[1]), maps)),
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
                seconds[name].append((time.perf_counter() - began) / len(files))
                used[name].append((time.process_time() - busy) / len(files))
                advance()
    timings = {name: Timing(tuple(values[1:])) for name, values in seconds.items()}
    return PipelineTime(
        {name: timings[name] for name in STAGES},
        timings["whole"],
        {name: Timing(tuple(used[name][1:])) for name in (*STAGES, "whole")},
        usable_cpus() if segmenter.plan.provider in ("cpu", "openvino") else 0,
        {name: timings[name] for name in others},
    )


def rounds(others: Mapping[str, Callable[[], object]], repeat: int) -> int:
    """Return how many passes `measure_pipeline` makes."""
    return (repeat + 1) * (len(STAGES) + 1 + len(others))


def write_plain(
    path: Path,
    files: Sequence[ImageFile],
    size: Grid,
    network: notebook.Network,
    labels: Labels,
    rules: Sequence[Rule],
) -> None:
    """The plain way with ONNX Runtime: OpenCV decodes and resizes, a session as its documentation shows it, OpenCV's
    component statistics and numpy's RLE, one image after another."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(labels.header)
        for image in files:
            probability, presence = network(notebook.read_image(image.path, size))
            for index, (label, rule) in enumerate(zip(labels.classes, rules, strict=True)):
                levels = probability[index]
                absent = presence is not None and presence[index] < rule.presence
                gated = (levels > rule.gate_threshold).sum() < rule.gate_pixels
                # The artifact's map is transposed: .T gives it as it lies, by columns.
                text = "" if absent or gated else peers.opencv(levels.T, True, rule.threshold, rule.min_area)
                rows.writerow([f"{image.key}_{label}", text])
