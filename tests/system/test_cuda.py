"""Calls of the CUDA runtime, to a stand-in that records them and to the real library without a driver; the arena."""

from __future__ import annotations

import ctypes
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from cloudrt.engines.binding import open_gpu
from cloudrt.engines.libraries import cuda_libraries, cuda_major, find_library
from cloudrt.system.cuda import Arena, CudaDevice, HostDevice
from cloudrt.system.nvidia import nvidia_driver


class Cudart:
    """The functions of the CUDA runtime that cloudrt calls, on host memory; it records most calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.held: dict[int, Any] = {}
        self.status = 0
        self.cudaGetErrorString = ErrorString()

    def cudaSetDevice(self, number: int) -> int:
        self.calls.append(("device", number))
        return 0

    def cudaHostAlloc(self, pointer: Any, size: ctypes.c_size_t, flags: int) -> int:
        if self.status:
            return self.status
        memory = (ctypes.c_uint8 * size.value)()
        pointer._obj.value = ctypes.addressof(memory)
        self.held[pointer._obj.value] = memory
        self.calls.append(("allocate", size.value, flags))
        return 0

    def cudaMemGetInfo(self, free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = 5 << 30, 80 << 30
        return self.status

    def cudaFreeHost(self, pointer: ctypes.c_void_p) -> int:
        del self.held[pointer.value or 0]
        return 0

    def cudaStreamCreateWithFlags(self, stream: Any, flags: int) -> int:
        stream._obj.value = 77
        self.calls.append(("stream", flags))
        return 0

    def cudaStreamDestroy(self, stream: ctypes.c_void_p) -> int:
        self.calls.append(("destroy", stream.value))
        return 0

    def cudaMemcpyAsync(self, target: Any, source: Any, size: Any, kind: int, stream: Any) -> int:
        ctypes.memmove(target, source, size.value)
        self.calls.append(("copy", size.value, kind, stream.value))
        return self.status

    def cudaStreamSynchronize(self, stream: Any) -> int:
        self.calls.append(("wait", stream.value))
        return 0


class ErrorString:
    """cudaGetErrorString."""

    restype: Any = None

    def __call__(self, status: int) -> bytes:
        return {2: b"out of memory", 719: b"unspecified launch failure"}[status]


def test_a_copy_is_one_call_on_a_non_blocking_stream() -> None:
    library = Cudart()
    device = CudaDevice(3, library)
    assert device.place == ("cuda", 3)
    arena = Arena(device.allocate_host)
    source, target = arena.empty((2, 5)), arena.empty((2, 5))
    source[:] = np.arange(10).reshape(2, 5)
    stream = device.open_stream()
    assert library.calls[-1] == ("stream", 1)  # cudaStreamNonBlocking
    library.calls.clear()
    device.copy(target.ctypes.data, source.ctypes.data, source.nbytes, stream)
    device.wait(stream)
    assert library.calls == [("device", 3), ("copy", 10, 4, 77), ("wait", 77)]
    assert (target == source).all()
    del stream
    gc.collect()
    assert library.calls[-1] == ("destroy", 77)


def test_page_locked_memory_is_freed_with_its_last_array() -> None:
    library = Cudart()
    arena = Arena(CudaDevice(0, library).allocate_host, keep=1)
    arrays = [arena.empty((10, 10)) for _ in range(3)]
    assert library.calls.count(("allocate", 100, 1)) == len(library.held) == 3
    row = arrays[0][3]
    del arrays
    gc.collect()
    assert len(library.held) == 2  # one in use, one kept
    row[:] = 1
    del row
    gc.collect()
    assert len(library.held) == 1


def test_errors_are_worded_like_those_of_onnx_runtime() -> None:
    library = Cudart()
    library.status = 2
    with pytest.raises(RuntimeError, match="CUDA failure 2: out of memory ; cudaHostAlloc"):
        CudaDevice(0, library).allocate_host(100)


def test_free_memory_is_that_of_the_gpu_asked_for() -> None:
    library = Cudart()
    assert CudaDevice(3, library).free_memory() == 5 * 2**30
    assert library.calls == [("device", 3)]


@pytest.mark.skipif(find_library(cuda_libraries(cuda_major())[0]) is None, reason="the CUDA runtime is not installed")
@pytest.mark.skipif(nvidia_driver() is not None, reason="there is a driver")
def test_the_runtime_library_has_these_functions() -> None:
    """Without a driver, each of them fails with a message."""
    device = open_gpu(0)
    assert type(device._library) is ctypes.CDLL  # its calls release the GIL, unlike those of PyDLL
    for call in (
        lambda: device.allocate_host(100),
        device.open_stream,
        device.free_memory,
        lambda: device.copy(0, 0, 0, ctypes.c_void_p()),
    ):
        with pytest.raises(RuntimeError, match=r"CUDA failure \d+: .*driver.* ; cuda"):
            call()
    for name in ("cudaHostAlloc", "cudaFreeHost", "cudaStreamCreateWithFlags", "cudaStreamDestroy", "cudaMemcpyAsync"):
        assert getattr(device._library, name)
    assert device._library.cudaStreamSynchronize and device._library.cudaMemGetInfo


def test_memory_is_used_again_once_no_view_is_left() -> None:
    arena = Arena(HostDevice().allocate_host)
    array = arena.empty((4, 6))
    address, view = array.ctypes.data, array[1:3, ::2].reshape(-1)
    kept = array[2]
    del array
    gc.collect()
    assert arena.empty((4, 6)).ctypes.data != address
    del view, kept
    gc.collect()
    one, other = arena.empty((3, 6)), arena.empty((4, 6))
    assert address in (one.ctypes.data, other.ctypes.data)  # for a smaller array too
    assert not np.shares_memory(one, other)
    assert arena.empty((400, 600)).shape == (400, 600)


def test_threads_never_share_an_array() -> None:
    arena = Arena(HostDevice().allocate_host, keep=3)
    ready = threading.Barrier(4)

    def work(number: int) -> bool:
        ready.wait(10)
        sound = True
        for _ in range(2_000):
            array = arena.empty((16,))
            array[:] = number
            sound &= bool((array == number).all())
        return sound

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert len(arena._unused) <= 3
