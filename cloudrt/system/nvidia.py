"""NVIDIA's driver, asked through its own library: no CUDA toolkit is needed, and nothing stays open."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver: the newest CUDA that it serves, and the GPUs that this process may use."""

    cuda: tuple[int, int]
    gpus: tuple[str, ...]


def nvidia_driver() -> Driver | None:
    """Ask NVIDIA's driver what it serves; None where there is no driver."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(version))
    cuda = (version.value // 1000, version.value % 1000 // 10)
    # cuInit fails where there is a driver and no GPU, or none that this process may see.
    if library.cuInit(0) != 0 or library.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return Driver(cuda, ())
    gpus = []
    for index in range(count.value):
        name, size = ctypes.create_string_buffer(256), ctypes.c_size_t(0)
        library.cuDeviceGetName(name, 256, index)
        library.cuDeviceTotalMem_v2(ctypes.byref(size), index)
        gpus.append(f"{name.value.decode('utf-8', 'replace')}, {size.value / 2**30:.0f} GiB")
    return Driver(cuda, tuple(gpus))
