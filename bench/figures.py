"""The result of a benchmark: the content of bench.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

from .accuracy import Accuracy
from .agreement import Agreement
from .ceilings import Ceilings
from .host import Host
from .latency import Latency
from .machine import machine, versions
from .options import BenchOptions
from .pipeline import PipelineTime
from .postprocess import PostprocessTime
from .scaling import Scaling
from .search import SearchTime
from .stages import StageTime
from .throughput import Point

SCHEMA = 4


def three_digits(value: float) -> str:
    """Return about three significant digits, never in powers of ten: "0.12", "1.23", "12.3", "1,234"."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


@dataclass
class BenchResult:
    """The figures of one run; parts that were not measured are None or empty.

    Parameters
    ----------
    options
        Options of the run.
    model
        The artifact and how it ran.
    images
        Number, size and source of the images.
    peer
        How the network of the notebook's way runs: library, precision and batch size.
    agreement
        Agreement between the results of cloudrt and of the notebook.
    skipped
        Peers that were not measured: name -> reason.
    stages
        Decode, infer, post-process and the whole pipeline, compared with the notebook's way.
    pipeline
        The whole pipeline, compared with its ceiling and with peers.
    ceilings
        Rate of each stage alone, in units of its work.
    postprocess, rle
        Post-processing, and RLE alone, compared with peers on one thread.
    search
        The exact search of rules, compared with nested loops.
    startup
        Start-up times of a new process.
    throughput
        Rate of the engine for each batch size and number of threads.
    accuracy
        Rate and Dice of every model in every provider.
    latency
        Latency of a single image.
    scaling
        Cost per image in runs of different lengths.
    host
        The pipeline without the network: overhead of passing work between stages, and their overlap.
    peak_rss_mb
        Peak memory of the process, with all peers.
    """

    options: BenchOptions
    model: dict[str, Any]
    images: dict[str, Any]
    peer: str
    agreement: Agreement
    skipped: dict[str, str]
    stages: list[StageTime] = field(default_factory=list)
    pipeline: PipelineTime | None = None
    ceilings: Ceilings | None = None
    postprocess: list[PostprocessTime] = field(default_factory=list)
    rle: dict[str, Any] = field(default_factory=dict)
    search: SearchTime | None = None
    startup: dict[str, Any] | None = None
    throughput: dict[str, list[Point]] | None = None
    accuracy: Accuracy | None = None
    latency: Latency | None = None
    scaling: Scaling | None = None
    host: Host | None = None
    peak_rss_mb: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        figures = {name: _plain(value) for name, value in vars(self).items() if name not in ("options", "peer")}
        command = self.options.command()
        about = {"schema": SCHEMA, "machine": machine(), "versions": versions(), "command": command}
        return about | {"notebook": self.peer} | figures


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
