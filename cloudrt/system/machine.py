"""The hardware that this process may use: processor, cores, memory and GPUs, within the limits of its container."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cloudrt.system.nvidia import nvidia_driver

_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd")
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class Machine:
    """The hardware that this process may use.

    Parameters
    ----------
    system
        Kernel name, release and architecture.
    cpu
        Model name of the processor.
    features
        Instruction-set extensions of the processor, as in /proc/cpuinfo, by which inference engines choose kernels.
    cores
        Number of usable CPUs; see `usable_cpus`.
    memory
        Memory in GiB; 0 if unknown.
    gpus
        Name and memory of each NVIDIA GPU.
    """

    system: str
    cpu: str
    features: tuple[str, ...]
    cores: int
    memory: float
    gpus: tuple[str, ...]


def describe_machine() -> Machine:
    """Return the hardware that this process may use."""
    driver = nvidia_driver()
    cpu, features = _read_cpuinfo(Path("/proc/cpuinfo"))
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    return Machine(system, cpu, features, usable_cpus(), _memory(), driver.gpus if driver else ())


def _read_cpuinfo(path: Path) -> tuple[str, tuple[str, ...]]:
    """Return the processor's model name and which of `_FEATURES` it has."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    lines = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text, re.MULTILINE))
    flags = set((lines.get("flags") or lines.get("Features") or "").split())
    name = lines.get("model name") or platform.processor() or platform.machine() or "unknown"
    return name, tuple(feature for feature in _FEATURES if feature in flags)


def _memory(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> float:
    """Return the smaller of the machine's memory and the container's limit, in GiB; 0 where unknown."""
    if not hasattr(os, "sysconf"):  # Windows
        return 0.0
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no control group, or "max"
        size = min(size, int(limit.read_text(encoding="ascii")))
    return round(size / 2**30, 3)


def usable_cpus(cpu_max: Path = CPU_MAX) -> int:
    """Return the number of CPUs that this process may use: the smaller of its CPU set and its container's quota.

    `os.cpu_count` counts the CPUs of the machine: in a container limited to 2 of 64 CPUs, it would lead to 64 threads.

    Parameters
    ----------
    cpu_max
        File with the quota, in the format of control groups version 2.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cpu_max.read_text(encoding="ascii").split()
        if quota != "max":
            cpus = min(cpus, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no control groups of version 2: only the CPU set applies
    return max(1, cpus)
