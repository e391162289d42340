"""The CUDA runtime through ctypes, which releases the GIL during a call: page-locked memory, streams and copies.

A copy from page-locked memory is a single transfer by the GPU's copy engine, and can run while kernels do; a copy from
pageable memory is staged by the driver and blocks the calling thread. `HostDevice` stands in for a GPU where there is
none: its memory is the host's.
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
"""Held while a CUDA graph is captured and while memory is allocated: an allocation would end the capture."""

_PORTABLE, _NON_BLOCKING, _ANY_DIRECTION = 1, 1, 4  # cudaHostAllocPortable, cudaStreamNonBlocking, cudaMemcpyDefault


class Device(Protocol):
    """Where a network runs, as copies see it. Addresses are those of the device or of the host.

    Parameters
    ----------
    place
        ONNX Runtime's name of it: "cuda" or "cpu", and a number.
    """

    place: tuple[str, int]

    def allocate_host(self, size: int) -> Any:
        """Return `size` bytes of host memory, an object with the buffer protocol, that copies directly."""
        ...

    def allocate(self, size: int) -> Any:
        """Return `size` bytes on the device, an object with a length; see `address_of`."""
        ...

    def open_stream(self) -> Any:
        """Return a queue of copies, which run one after another."""
        ...

    def copy(self, target: int, source: int, size: int, stream: Any) -> None:
        """Start to copy `size` bytes from an address to another, in any direction."""
        ...

    def wait(self, stream: Any) -> None:
        """Wait for the copies of a stream."""
        ...


class HostDevice:
    """The host as its own device."""

    place = ("cpu", 0)

    def allocate_host(self, size: int) -> Any:
        """Return ordinary memory."""
        return (ctypes.c_uint8 * size)()

    allocate = allocate_host

    def open_stream(self) -> None:
        """Return nothing: copies are done when they return."""

    def copy(self, target: int, source: int, size: int, stream: None) -> None:
        """Copy at once."""
        ctypes.memmove(target, source, size)

    def wait(self, stream: None) -> None:
        """Do nothing."""


class CudaDevice:
    """A GPU, through the CUDA runtime.

    Parameters
    ----------
    number
        Of the GPU.
    library
        The runtime library, loaded.

    Raises
    ------
    RuntimeError
        Raised by every method where CUDA refuses the call; the message is worded as ONNX Runtime's.
    """

    def __init__(self, number: int, library: Any) -> None:
        self.place, self._library = ("cuda", number), library
        library.cudaGetErrorString.restype = ctypes.c_char_p

    def allocate_host(self, size: int) -> Any:
        """Return page-locked memory, freed with the object."""
        pointer = ctypes.c_void_p()
        with CAPTURE:
            self._enter()
            self._call("cudaHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(size), _PORTABLE)
        memory = (ctypes.c_uint8 * size).from_address(pointer.value or 0)
        weakref.finalize(memory, self._library.cudaFreeHost, pointer).atexit = False
        return memory

    def allocate(self, size: int) -> DeviceMemory:
        """Return memory of the GPU, freed with the object."""
        pointer = ctypes.c_void_p()
        with CAPTURE:
            self._enter()
            self._call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(size))
        memory = DeviceMemory(pointer.value or 0, size)
        weakref.finalize(memory, self._library.cudaFree, pointer).atexit = False
        return memory

    def open_stream(self) -> ctypes.c_void_p:
        """Return a stream that does not wait for the default stream."""
        stream = ctypes.c_void_p()
        self._enter()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), _NON_BLOCKING)
        weakref.finalize(stream, self._library.cudaStreamDestroy, ctypes.c_void_p(stream.value)).atexit = False
        return stream

    def copy(self, target: int, source: int, size: int, stream: ctypes.c_void_p) -> None:
        """Start to copy."""
        self._enter()
        pointers = ctypes.c_void_p(target), ctypes.c_void_p(source)
        self._call("cudaMemcpyAsync", *pointers, ctypes.c_size_t(size), _ANY_DIRECTION, stream)

    def wait(self, stream: ctypes.c_void_p) -> None:
        """Wait for a stream."""
        self._call("cudaStreamSynchronize", stream)

    def _enter(self) -> None:
        """Make the GPU the calling thread's."""
        self._call("cudaSetDevice", self.place[1])

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            text = self._library.cudaGetErrorString(status) or b"unknown error"
            raise RuntimeError(f"CUDA failure {status}: {text.decode()} ; {name}")


class DeviceMemory:
    """Memory of a GPU: its address, and its size in bytes."""

    def __init__(self, address: int, size: int) -> None:
        self.address, self._size = address, size

    def __len__(self) -> int:
        return self._size


def address_of(memory: Any) -> int:
    """Return the address of what a `Device` allocated."""
    return memory.address if isinstance(memory, DeviceMemory) else ctypes.addressof(memory)


class DeviceArray:
    """A uint8 array on a device, in C order; a slice along the first axis shares its memory.

    Parameters
    ----------
    address
        Of the first element.
    shape
        Its axes.
    base
        The array that it is a slice of, which keeps the memory.
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
    """Arrays of uint8 whose memory is used again once nothing refers to them or to a view of them.

    Page-locking takes longer than copying, and new memory is zeroed page by page when it is first written.

    Parameters
    ----------
    allocate
        Returns a number of bytes; see `Device`.
    keep
        Largest number of unused pieces to keep.
    """

    def __init__(self, allocate: Callable[[int], Any], keep: int = 8) -> None:
        self._allocate, self._keep = allocate, keep
        self._unused: list[Any] = []

    def empty(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Return an array, not initialised; for memory of the host."""
        size = prod(shape)
        memory = self._take(size)
        flat = np.frombuffer(memory, np.uint8, size)
        weakref.finalize(flat, self._give_back, memory).atexit = False
        return flat.reshape(shape)

    def on_device(self, shape: tuple[int, ...]) -> DeviceArray:
        """Return the same for memory of a device."""
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
        # No lock: this runs wherever the last reference is dropped.
        self._unused.append(memory)
        del self._unused[: -self._keep]
