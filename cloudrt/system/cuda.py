"""The CUDA runtime through ctypes, which releases the GIL during a call: page-locked memory, streams and copies.

A copy from page-locked memory is a single transfer by the GPU's copy engine, and can overlap with kernels; a copy from
pageable memory is staged by the driver and blocks the calling thread. `HostDevice` has the same interface and uses host
memory, for machines without a GPU.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from contextlib import suppress
from math import prod
from threading import RLock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

CAPTURE = RLock()
"""Held while a CUDA graph is captured and while memory is allocated: an allocation would invalidate the capture."""

_PORTABLE, _NON_BLOCKING, _ANY_DIRECTION = 1, 1, 4  # cudaHostAllocPortable, cudaStreamNonBlocking, cudaMemcpyDefault


class Device(Protocol):
    """Memory and copies of the device that runs the network. An address may be on the device or on the host.

    Parameters
    ----------
    place
        ONNX Runtime's device type and number, such as ("cuda", 0) or ("cpu", 0).
    """

    place: tuple[str, int]

    def allocate_host(self, size: int) -> Any:
        """Return `size` bytes of host memory, page-locked for a GPU, as an object with the buffer protocol."""
        ...

    def allocate(self, size: int) -> Any:
        """Return `size` bytes of device memory, as an object with a length; `address_of` returns its address."""
        ...

    def open_stream(self) -> Any:
        """Return a stream; its copies run one after another."""
        ...

    def copy(self, target: int, source: int, size: int, stream: Any) -> None:
        """Start to copy `size` bytes from address `source` to address `target`, in any direction."""
        ...

    def wait(self, stream: Any) -> None:
        """Wait until all copies of a stream are complete."""
        ...


class HostDevice:
    """The host as its own device."""

    place = ("cpu", 0)

    def allocate_host(self, size: int) -> Any:
        """Return ordinary memory."""
        return (ctypes.c_uint8 * size)()

    allocate = allocate_host

    def open_stream(self) -> None:
        """Return None: copies are synchronous."""

    def copy(self, target: int, source: int, size: int, stream: None) -> None:
        """Copy synchronously."""
        ctypes.memmove(target, source, size)

    def wait(self, stream: None) -> None:
        """Do nothing."""


class CudaDevice:
    """A GPU, through the CUDA runtime.

    Parameters
    ----------
    number
        GPU number.
    library
        The CUDA runtime, loaded with ctypes.

    Raises
    ------
    RuntimeError
        Raised by every method if CUDA reports an error. The message has the format of ONNX Runtime's CUDA errors.
    """

    def __init__(self, number: int, library: Any) -> None:
        self.place, self._library = ("cuda", number), library
        library.cudaGetErrorString.restype = ctypes.c_char_p

    def allocate_host(self, size: int) -> Any:
        """Return page-locked memory that is freed with the returned object."""
        pointer = ctypes.c_void_p()
        with CAPTURE:
            self._enter()
            self._call("cudaHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(size), _PORTABLE)
        memory = (ctypes.c_uint8 * size).from_address(pointer.value or 0)
        weakref.finalize(memory, self._library.cudaFreeHost, pointer).atexit = False
        return memory

    def allocate(self, size: int) -> DeviceMemory:
        """Return GPU memory that is freed with the returned object."""
        pointer = ctypes.c_void_p()
        with CAPTURE:
            self._enter()
            self._call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(size))
        memory = DeviceMemory(pointer.value or 0, size)
        weakref.finalize(memory, self._library.cudaFree, pointer).atexit = False
        return memory

    def free_memory(self) -> int:
        """Return the free memory of the GPU in bytes."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._enter()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def open_stream(self) -> ctypes.c_void_p:
        """Return a stream that does not wait for the default stream."""
        stream = ctypes.c_void_p()
        self._enter()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), _NON_BLOCKING)
        weakref.finalize(stream, self._library.cudaStreamDestroy, ctypes.c_void_p(stream.value)).atexit = False
        return stream

    def copy(self, target: int, source: int, size: int, stream: ctypes.c_void_p) -> None:
        """Start to copy; see `Device`."""
        self._enter()
        pointers = ctypes.c_void_p(target), ctypes.c_void_p(source)
        self._call("cudaMemcpyAsync", *pointers, ctypes.c_size_t(size), _ANY_DIRECTION, stream)

    def wait(self, stream: ctypes.c_void_p) -> None:
        """Wait until all work of a stream is complete."""
        self._call("cudaStreamSynchronize", stream)

    def _enter(self) -> None:
        """Make this GPU the current device of the calling thread."""
        self._call("cudaSetDevice", self.place[1])

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            text = self._library.cudaGetErrorString(status) or b"unknown error"
            raise RuntimeError(f"CUDA failure {status}: {text.decode()} ; {name}")


class DeviceMemory:
    """GPU memory: its address, and its size in bytes as `len`."""

    def __init__(self, address: int, size: int) -> None:
        self.address, self._size = address, size

    def __len__(self) -> int:
        return self._size


def address_of(memory: Any) -> int:
    """Return the address of memory that a `Device` allocated."""
    return memory.address if isinstance(memory, DeviceMemory) else ctypes.addressof(memory)


class DeviceArray:
    """A uint8 array on a device, in C order; a slice along the first axis shares its memory.

    Parameters
    ----------
    address
        Address of the first element.
    shape
        Length of each axis.
    base
        For a slice, the array that owns the memory.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, address: int, shape: tuple[int, ...], base: DeviceArray | None = None) -> None:
        self.address, self.shape, self._base = address, shape, base

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> DeviceArray:
        first, stop, _ = rows.indices(len(self))
        return DeviceArray(self.address_of(first), (max(0, stop - first), *self.shape[1:]), self._base or self)

    def address_of(self, row: int) -> int:
        """Return the address of a row."""
        return self.address + row * prod(self.shape[1:])


Batch = NDArray[np.uint8] | DeviceArray
"""(N, H, W, 3) images, on the host or on a device."""


class Arena:
    """Allocator of uint8 arrays; their memory is reused once no array or view refers to it.

    Reuse is faster: page-locking memory takes longer than a copy, and the operating system zeroes each new page at its
    first write.

    Parameters
    ----------
    allocate
        Allocates a number of bytes: `Device.allocate` or `Device.allocate_host`.
    keep
        Largest number of unused buffers to keep, at least 1.
    """

    def __init__(self, allocate: Callable[[int], Any], keep: int = 8) -> None:
        self._allocate, self._keep = allocate, keep
        self._unused: list[Any] = []

    def empty(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Return an uninitialised array in host memory."""
        size = prod(shape)
        memory = self._take(size)
        flat = np.frombuffer(memory, np.uint8, size)
        weakref.finalize(flat, self._give_back, memory).atexit = False
        return flat.reshape(shape)

    def on_device(self, shape: tuple[int, ...]) -> DeviceArray:
        """Return an uninitialised array in device memory."""
        memory = self._take(prod(shape))
        array = DeviceArray(address_of(memory), shape)
        weakref.finalize(array, self._give_back, memory).atexit = False
        return array

    def _take(self, size: int) -> Any:
        for memory in list(self._unused):
            if size <= len(memory) <= 2 * size:
                with suppress(ValueError):  # another thread took it
                    self._unused.remove(memory)
                    return memory
        return self._allocate(size)

    def _give_back(self, memory: Any) -> None:
        # Without a lock: a finalizer can run at any point of any thread, even while that thread holds a lock.
        self._unused.append(memory)
        del self._unused[: -self._keep]
