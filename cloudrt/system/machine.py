"""The computer, as far as this process may use it: processor, cores, memory and GPUs."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cloudrt.system.nvidia import nvidia_driver

_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8", "asimd")
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Machine:
    """The computer, as far as this process may use it; memory in GiB."""

    system: str
    cpu: str
    features: tuple[str, ...]
    cores: int
    memory: float
    gpus: tuple[str, ...]


def describe_machine() -> Machine:
    """Return the computer, as far as this process may use it."""
    driver = nvidia_driver()
    cpu, features = _read_cpuinfo(Path("/proc/cpuinfo"))
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    return Machine(system, cpu, features, usable_cpus(), _memory(), driver.gpus if driver else ())


def _read_cpuinfo(path: Path) -> tuple[str, tuple[str, ...]]:
    """Return the processor's name and those of its features that matter here."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    lines = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text, re.MULTILINE))
    flags = set((lines.get("flags") or lines.get("Features") or "").split())
    name = lines.get("model name") or platform.processor() or platform.machine() or "unknown"
    return name, tuple(feature for feature in _FEATURES if feature in flags)


def _memory(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> float:
    """Return GiB of memory: the machine's, or the container's where it is less; 0 where that cannot be told."""
    if not hasattr(os, "sysconf"):  # Windows
        return 0.0
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no control group, or "max"
        size = min(size, int(limit.read_text(encoding="ascii")))
    return round(size / 2**30, 1)


def usable_cpus(cpu_max: Path = CPU_MAX) -> int:
    """Return the smaller of the CPU set and the container's quota, at least 1.

    `os.cpu_count` counts the machine's cores; a container that may use two of its 64 would run 64 threads on them.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cpu_max.read_text(encoding="ascii").split()
        if quota != "max":
            cpus = min(cpus, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no control group of the second version: the CPU set alone counts
    return max(1, cpus)
