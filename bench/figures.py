"""What the bench is asked for, and what it found: the content of bench.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloudrt.errors import DataError

from . import postprocess
from .accuracy import Accuracy
from .agreement import Agreement
from .ceilings import Ceilings
from .latency import Latency
from .machine import machine, versions
from .pipeline import PipelineTime
from .scaling import Scaling
from .search import SearchTime
from .stages import StageTime
from .throughput import Point

SCHEMA = 4

PARTS = (
    "stages",
    "pipeline",
    "throughput",
    "accuracy",
    "post-process",
    "search",
    "latency",
    "start-up",
    "scaling",
)
DEFAULT = PARTS[:-1]
"""Scaling runs thousands of images."""


def three_digits(value: float) -> str:
    """Return about three significant digits, never in powers of ten: "0.12", "1.23", "12.3", "1,234"."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


@dataclass(frozen=True)
class Options:
    """What to measure.

    Parameters
    ----------
    models
        Artifacts; ./model.onnx, else the shipped one, where there is none. All are compared in accuracy, and the first
        is measured in everything else.
    data
        A folder of images; made-up scenes where it is None.
    truth
        A table of RLE on the label grid, as train.csv, of the images in `data`.
    images
        At most so many; 0 is 6 or more, so that they fill whole batches.
    provider, batch_size, threads
        Those of `cloudrt.Segmenter`; threads other than 0 hold for the notebook's way too.
    checkpoint
        The best.pth that the artifact was exported from: the notebook's way runs it in PyTorch.
    baseline
        The fp32 artifact that plain ONNX Runtime runs; `model` where it is None.
    repeat
        Passes of each way that count.
    only
        Which of `PARTS` to measure; `DEFAULT` where there are none.
    """

    models: tuple[Path, ...] = ()
    data: Path | None = None
    truth: Path | None = None
    images: int = 0
    provider: str = "auto"
    batch_size: int = 0
    threads: int = 0
    checkpoint: Path | None = None
    baseline: Path | None = None
    repeat: int = 5
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.images < 0 or self.repeat < 1:
            raise DataError(f"at least one image and one repetition, found {self.images} and {self.repeat}")
        if self.truth and not self.data:
            raise DataError("a truth is of given images: name their folder with --data")
        if self.truth and "accuracy" not in self.parts:
            raise DataError("a truth is for the accuracy part: add --only accuracy, or leave --truth out")

    @property
    def model(self) -> Path | None:
        """The first of the models."""
        return self.models[0] if self.models else None

    @property
    def parts(self) -> tuple[str, ...]:
        """What is measured."""
        return self.only or DEFAULT

    def command(self) -> list[str]:
        """Return the command line of these options; folders, which may be named after their user, as DIR."""
        words = ["cloudrt-bench", *(model.name for model in self.models), *(["--data", "DIR"] if self.data else [])]
        words += ["--truth", self.truth.name] if self.truth else []
        words += ["--provider", self.provider, "--repeat", str(self.repeat)]
        words += ["--images", str(self.images)] if self.images else []
        words += ["--batch-size", str(self.batch_size)] if self.batch_size else []
        words += ["--baseline", self.baseline.name] if self.baseline else []
        words += ["--threads", str(self.threads)] if self.threads else []
        words += [word for part in self.only for word in ("--only", part)]
        return words + (["--checkpoint", self.checkpoint.name] if self.checkpoint else [])


@dataclass(frozen=True)
class Bench:
    """What one run found.

    Parameters
    ----------
    options
        What was asked for.
    model
        The artifact and how it ran.
    images
        How many there were, of what size, and where they came from.
    peer
        The network of the notebook's way.
    skipped
        Peers that were not measured: name -> why.
    pipeline
        The whole beside what its stages allow, and beside peers.
    stages, agreement, peak_rss_mb
        The figures of decode, infer, post-process and the whole; memory is that of the process, both ways together.
    postprocess, rle
        Post-processing, and RLE alone, beside peers on one thread.
    search
        The exact search beside the nested loops.
    startup
        What a new process waits for.
    ceilings
        Each stage alone in units of its own work.
    throughput
        The engine's rate against batch size and threads.
    accuracy
        Every model in every provider: rate and Dice.
    latency
        Of one image that comes alone.
    scaling
        The cost of an image in runs of different lengths.
    """

    options: Options
    model: dict[str, Any]
    images: dict[str, Any]
    peer: str
    skipped: dict[str, str]
    stages: list[StageTime]
    pipeline: PipelineTime | None
    agreement: Agreement
    peak_rss_mb: float | None
    postprocess: list[postprocess.PostprocessTime]
    rle: dict[str, Any]
    search: SearchTime | None
    startup: dict[str, Any] | None
    ceilings: Ceilings | None = None
    throughput: dict[str, list[Point]] | None = None
    accuracy: Accuracy | None = None
    latency: Latency | None = None
    scaling: Scaling | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "schema": SCHEMA,
            "machine": machine(),
            "versions": versions(),
            "command": self.options.command(),
            "model": self.model,
            "images": self.images,
            "notebook": self.peer,
            "skipped": self.skipped,
            "stages": [stage.to_dict() for stage in self.stages],
            "pipeline": self.pipeline.to_dict() if self.pipeline else None,
            "agreement": vars(self.agreement),
            "peak_rss_mb": self.peak_rss_mb,
            "postprocess": [measured.to_dict() for measured in self.postprocess],
            "rle": self.rle,
            "search": self.search.to_dict() if self.search else None,
            "startup": self.startup,
            "ceilings": self.ceilings.to_dict() if self.ceilings else None,
            "throughput": {name: [vars(point) for point in points] for name, points in self.throughput.items()}
            if self.throughput
            else None,
            "accuracy": self.accuracy.to_dict() if self.accuracy else None,
            "latency": self.latency.to_dict() if self.latency else None,
            "scaling": self.scaling.to_dict() if self.scaling else None,
        }
