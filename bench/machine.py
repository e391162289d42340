"""What a figure was measured on: without it a ratio cannot be judged. Names no host, user or path."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cloudrt.system.machine import usable_cpus
from cloudrt.system.versions import VERSION

PACKAGES = (
    "numpy",
    "numba",
    "onnx",
    "onnxruntime-gpu",
    "onnxruntime",
    "openvino",
    "opencv-python-headless",
    "simplejpeg",
    "torch",
)


def machine() -> dict[str, str | int | float | None]:
    """Return CPU model, cores that this process may use, memory in GB and system."""
    return {
        "cpu": _cpu_model(),
        "usable_cores": usable_cpus(),
        "memory_gb": _memory_gb(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Return the versions of cloudrt, Python and the libraries that are installed."""
    found = {"cloudrt": VERSION, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    """Return the smaller of the machine's memory and the container's limit."""
    if not hasattr(os, "sysconf"):
        return None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no control group of the second version, or no limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return round(total / 1e9, 1)
