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
    """Return CPU model, instruction-set extensions, usable cores, memory in GB and system; see `Machine`."""
    found = describe_machine()
    return {
        "cpu": found.cpu,
        "features": " ".join(found.features),
        "usable_cores": found.cores,
        "memory_gb": round(found.memory * 2**30 / 1e9, 1) or None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Return the versions of cloudrt, Python and the installed libraries."""
    return {"cloudrt": VERSION, "python": platform.python_version()} | package_versions(*PACKAGES)
