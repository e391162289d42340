"""What a run was busy with: seconds, latencies and queues of each stage, in memory that does not grow."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

_SHORTEST, _RATIO, _BUCKETS = 1e-6, 1.02, 1200
"""Latencies are counted in buckets of 2% from a microsecond on, up to some six hours."""


class StageStats:
    """One stage. Safe to use from its threads.

    Parameters
    ----------
    threads
        How many work at once.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.count = 0
        self.seconds = 0.0
        self.longest = 0.0
        self._histogram = [0] * _BUCKETS
        self._ready = [0, 0, 0]  # pulls, sum and maximum of what lay ready
        self._lock = Lock()

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time within as one piece of work, whether it fails or not."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(time.perf_counter() - began)

    def add(self, seconds: float) -> None:
        """Count one piece of work."""
        bucket = math.ceil(math.log(max(seconds, _SHORTEST) / _SHORTEST, _RATIO))
        with self._lock:
            self.count += 1
            self.seconds += seconds
            self.longest = max(self.longest, seconds)
            self._histogram[min(bucket, _BUCKETS - 1)] += 1

    def pulled(self, ready: int) -> None:
        """Count how many answers lay ready when one was pulled."""
        self._ready[0] += 1
        self._ready[1] += ready
        self._ready[2] = max(self._ready[2], ready)

    def percentile(self, share: float) -> float:
        """Return the seconds that this share of the pieces took at most, within 2%; 0 where there were none."""
        wanted, seen = math.ceil(share * self.count), 0
        for bucket, number in enumerate(self._histogram):
            seen += number
            if number and seen >= wanted:
                return min(_SHORTEST * _RATIO**bucket, self.longest)
        return 0.0

    def load(self, elapsed: float) -> float:
        """Return the share of its threads' time that the stage was busy."""
        return self.seconds / (self.threads * elapsed) if elapsed > 0 else 0.0

    def to_dict(self, elapsed: float) -> dict[str, Any]:
        """Plain values, for JSON; milliseconds for a single piece of work, which for the engine is a batch."""
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
    """All stages of a pipeline.

    Parameters
    ----------
    threads
        Of decoding and of post-processing; the engine has one.
    """

    def __init__(self, threads: int) -> None:
        self.stages = {"decode": StageStats(threads), "infer": StageStats(1), "postprocess": StageStats(threads)}
        self._began = time.perf_counter()

    def __getitem__(self, stage: str) -> StageStats:
        return self.stages[stage]

    def limiting(self) -> str:
        """Return the stage whose threads were busy the most: more of them, or faster work there, would help."""
        elapsed = time.perf_counter() - self._began
        return max(self.stages, key=lambda name: self.stages[name].load(elapsed))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
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
    """Return the most memory that this process ever held, MB; None where the system does not say.

    Linux is asked for VmHWM: what getrusage says begins with the memory of the process that started this one.
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
    """Return the memory that this process holds now, MB; None where the system does not say."""
    return _from_status("VmRSS", status)


def _from_status(name: str, status: Path) -> float | None:
    try:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return round(int(lines[name].split()[0]) * 1024 / 1e6, 1)
    except (OSError, KeyError, ValueError):
        return None
