"""Busy time, latency and queue length of each pipeline stage, in constant memory; and the memory of the process."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

_SHORTEST, _RATIO, _BUCKETS = 1e-6, 1.02, 1200
"""The histogram of latencies: buckets 2% wide, from 1 microsecond to about 6 hours."""
_LOG_RATIO = math.log(_RATIO)
_PENDING = 1000
"""Durations that are added to the histogram at once."""


class StageStats:
    """Statistics of one stage; thread-safe.

    Parameters
    ----------
    threads
        Number of threads of the stage.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.count = 0
        self.seconds = 0.0
        self.longest = 0.0
        self._histogram = np.zeros(_BUCKETS, np.int64)
        self._pending: list[float] = []  # durations that are not in the histogram yet
        self._calls: list[int] = []  # number of calls of each
        self._ready = [0, 0, 0]  # number of calls of `pulled`; sum and maximum of the results that were ready
        self._waiting = 0  # results that are ready but not taken yet
        self._lock = Lock()

    def add(self, seconds: float, calls: int = 1) -> None:
        """Record calls that took `seconds` each."""
        self._add([seconds], calls)

    def add_all(self, seconds: Sequence[float]) -> None:
        """Record one call for each of `seconds`."""
        if seconds:
            self._add(seconds, 1)

    def _add(self, seconds: Sequence[float], calls: int) -> None:
        with self._lock:
            self.count += calls * len(seconds)
            self.seconds += calls * sum(seconds)
            self.longest = max(self.longest, *seconds)
            self._waiting += calls * len(seconds)
            self._pending += seconds
            self._calls += [calls] * len(seconds)
            if len(self._pending) > _PENDING:
                self._count_pending()

    def _count_pending(self) -> None:
        """Add the pending durations to the histogram together, because NumPy is slow for one at a time."""
        ratios = np.maximum(np.array(self._pending), _SHORTEST) / _SHORTEST
        buckets = np.minimum(np.ceil(np.log(ratios) / _LOG_RATIO).astype(np.intp), _BUCKETS - 1)
        np.add.at(self._histogram, buckets, self._calls)
        self._pending.clear()
        self._calls.clear()

    def pulled(self, results: int = 1) -> None:
        """Record how many results were ready when the next stage took `results` of them."""
        with self._lock:
            ready = self._waiting
            self._waiting = max(0, ready - results)
            self._ready[0] += 1
            self._ready[1] += ready
            self._ready[2] = max(self._ready[2], ready)

    def drop(self) -> None:
        """Reset the number of ready results: the run was closed early, and they will not be taken."""
        with self._lock:
            self._waiting = 0

    def percentile(self, share: float) -> float:
        """Return a quantile of the calls' duration in seconds, within 2%; 0 without calls. `share` is in 0..1."""
        if not self.count:
            return 0.0
        with self._lock:
            self._count_pending()
            bucket = int(np.searchsorted(self._histogram.cumsum(), math.ceil(share * self.count)))
            return min(_SHORTEST * _RATIO**bucket, self.longest)

    def load(self, elapsed: float) -> float:
        """Return the fraction of its threads' time, over `elapsed` seconds, in which the stage was busy."""
        return self.seconds / (self.threads * elapsed) if elapsed > 0 else 0.0

    def to_dict(self, elapsed: float) -> dict[str, Any]:
        """Return plain values, for JSON; latencies are milliseconds per call, which for the engine is a batch."""
        pulls, ready, most = self._ready
        return {
            "threads": self.threads,
            "count": self.count,
            "busy_s": round(self.seconds, 4),
            "load": round(self.load(elapsed), 4),
            "latency_ms": {
                "mean": round(1000 * self.seconds / self.count, 4) if self.count else 0.0,
                **{f"p{100 * share:g}": round(1000 * self.percentile(share), 4) for share in (0.5, 0.9, 0.99)},
                "max": round(1000 * self.longest, 4),
            },
            "ready_when_pulled": {"mean": round(ready / pulls, 2) if pulls else 0.0, "max": most},
        }


class PipelineStats:
    """Statistics of the stages of a pipeline.

    Parameters
    ----------
    threads
        Number of threads for decoding, and for post-processing. That of the engine is 1 until its caller sets it.
    """

    def __init__(self, threads: int) -> None:
        self.stages = {"decode": StageStats(threads), "infer": StageStats(1), "postprocess": StageStats(threads)}
        self._began = time.perf_counter()

    def __getitem__(self, stage: str) -> StageStats:
        return self.stages[stage]

    def drop(self) -> None:
        """Reset the number of ready results of each stage; see `StageStats.drop`."""
        for stage in self.stages.values():
            stage.drop()

    def limiting(self) -> str:
        """Return the stage with the highest load, the bottleneck."""
        elapsed = time.perf_counter() - self._began
        return max(self.stages, key=lambda name: self.stages[name].load(elapsed))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        elapsed = time.perf_counter() - self._began
        return {
            "elapsed_s": round(elapsed, 4),
            "limiting_stage": self.limiting(),
            "peak_memory_mb": peak_memory(),
            "memory_mb": memory(),
            "stages": {name: stage.to_dict(elapsed) for name, stage in self.stages.items()},
        }


_STATUS = Path("/proc/self/status")


def peak_memory(status: Path = _STATUS) -> float | None:
    """Return the peak resident memory of this process in MB; None where unknown.

    Linux reports it as VmHWM; the maximum of `getrusage` would include the memory of the parent process at fork.
    """
    found = _from_status("VmHWM", status)
    if found is not None:
        return found
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def memory(status: Path = _STATUS) -> float | None:
    """Return the resident memory of this process in MB; None where unknown."""
    return _from_status("VmRSS", status)


def _from_status(name: str, status: Path) -> float | None:
    try:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return round(int(lines[name].split()[0]) * 1024 / 1e6, 1)
    except (OSError, KeyError, ValueError):
        return None
