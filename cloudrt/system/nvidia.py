"""Query NVIDIA's driver through its own library (libcuda); no CUDA toolkit is needed."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
KERNEL_MODULE = Path("/proc/driver/nvidia/version")
"""Exists on Linux while the driver's kernel module is loaded, in containers too."""


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver.

    Parameters
    ----------
    cuda
        Major and minor number of the newest CUDA version that it supports.
    gpus
        Name and memory of each GPU that this process may use.
    capabilities
        Compute capability of each GPU, as major and minor number.
    fault
        Name of the driver's error, such as CUDA_ERROR_NO_DEVICE, if the driver cannot be used; else empty.
    """

    cuda: tuple[int, int]
    gpus: tuple[str, ...]
    capabilities: tuple[tuple[int, int], ...] = ()
    fault: str = ""


def driver_is_loaded() -> bool:
    """Return whether NVIDIA's driver is there, or only its kernel module, as in a container started without GPUs."""
    return nvidia_driver() is not None or KERNEL_MODULE.exists()


def nvidia_driver() -> Driver | None:
    """Return the driver and its GPUs, or None if no driver is installed."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(version))
    cuda = (version.value // 1000, version.value % 1000 // 10)
    # cuInit fails if the driver is installed but no GPU is visible to this process.
    status = library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count))
    if status:
        return Driver(cuda, (), fault=_error_name(library, status))
    devices = range(count.value)
    return Driver(
        cuda, tuple(_describe(library, device) for device in devices), tuple(_capability(library, d) for d in devices)
    )


def _describe(library: ctypes.CDLL, device: int) -> str:
    name, size = ctypes.create_string_buffer(256), ctypes.c_size_t(0)
    library.cuDeviceGetName(name, 256, device)
    library.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    return f"{name.value.decode('utf-8', 'replace')}, {size.value / 2**30:.0f} GiB"


def _capability(library: ctypes.CDLL, device: int) -> tuple[int, int]:
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        number = ctypes.c_int(0)
        library.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        numbers.append(number.value)
    return numbers[0], numbers[1]


def _error_name(library: ctypes.CDLL, status: int) -> str:
    text = ctypes.c_char_p()
    library.cuGetErrorName(status, ctypes.byref(text))
    return text.value.decode() if text.value else f"error {status}"
