"""The machine and the library versions of a measurement, without names of hosts, users or folders."""

from __future__ import annotations

import platform

from cloudrt.system.machine import describe_machine
from cloudrt.system.versions import VERSION, package_versions

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
    """Return the CPU model, the cores that this process may use, the memory in GB and the system."""
    found = describe_machine()
    return {
        "cpu": found.cpu,
        "usable_cores": found.cores,
        "memory_gb": round(found.memory * 2**30 / 1e9, 1) or None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Return the versions of cloudrt, Python and the installed libraries."""
    return {"cloudrt": VERSION, "python": platform.python_version()} | package_versions(*PACKAGES)
