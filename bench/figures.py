"""What the bench is asked for, and what it found: the content of bench.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloudrt.errors import DataError

from . import postprocess
from .agreement import Agreement
from .machine import machine, versions
from .pipeline import PipelineTime
from .search import SearchTime
from .stages import Measured

SCHEMA = 3

PARTS = ("stages", "pipeline", "post-process", "search", "start-up")


@dataclass(frozen=True)
class Options:
    """What to measure.

    Parameters
    ----------
    model
        The artifact; ./model.onnx, else the shipped one, where it is None.
    data
        A folder of images; made-up scenes where it is None.
    images
        At most so many; 0 is 12 or more, so that they fill whole batches.
    provider, batch_size, threads
        Those of `cloudrt.Segmenter`; threads other than 0 hold for the notebook's way too.
    checkpoint
        The best.pth that the artifact was exported from: the notebook's way runs it in PyTorch.
    baseline
        The fp32 artifact that plain ONNX Runtime runs; `model` where it is None.
    repeat
        Passes of each way that count.
    only
        Which of `PARTS` to measure; all where there are none.
    """

    model: Path | None = None
    data: Path | None = None
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

    def command(self) -> list[str]:
        """Return the command line of these options; folders, which may be named after their user, as DIR."""
        words = ["cloudrt-bench", *([self.model.name] if self.model else []), *(["--data", "DIR"] if self.data else [])]
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
    """

    options: Options
    model: dict[str, Any]
    images: dict[str, Any]
    peer: str
    skipped: dict[str, str]
    stages: list[Measured]
    pipeline: PipelineTime | None
    agreement: Agreement
    peak_rss_mb: float | None
    postprocess: list[postprocess.Measured]
    rle: dict[str, Any]
    search: SearchTime | None
    startup: dict[str, Any] | None

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
        }
