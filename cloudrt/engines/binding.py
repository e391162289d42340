"""Buffers on a GPU: a batch is copied to them, computed, and its outputs are copied back, without an allocation.

    host, page-locked --copy--> device: image --session--> device: probability, presence --copy--> host, page-locked

No step holds the GIL. While the batch of one binding is computed, that of another is copied.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from cloudrt.engines.libraries import cuda_libraries, cuda_major, find_library
from cloudrt.model.artifact import Artifact
from cloudrt.system.cuda import Arena, Batch, CudaDevice, Device, DeviceArray, address_of

Compute = Callable[[Callable[[], None]], None]
"""Calls a function that computes a batch, on the thread and with the concurrency that the engine requires."""


class Binding:
    """The buffers of one batch in flight in a session of ONNX Runtime; not thread-safe.

    Parameters
    ----------
    session
        The `onnxruntime.InferenceSession`; several bindings may share one.
    artifact
        Metadata of the model, for the shapes.
    batch_size
        The fixed N.
    device
        Allocates the buffers and copies.
    arena
        Allocates page-locked host memory for the outputs.
    graph
        ID of the CUDA graph of this binding, or None. A graph contains the addresses of its buffers, so each
        binding has its own.
    """

    def __init__(
        self,
        session: Any,
        artifact: Artifact,
        batch_size: int,
        device: Device,
        arena: Arena,
        graph: int | None = None,
    ) -> None:
        self._session, self._device, self._arena = session, device, arena
        self._stream = device.open_stream()
        self._binding = session.io_binding()
        self._options = onnxruntime.RunOptions()
        if graph is not None:
            self._options.add_run_config_entry("gpu_graph_id", str(graph))
        shapes = {"probability": artifact.output_shape, "presence": (len(artifact.labels.classes),)}

        # Allocated here: ONNX Runtime does not release device memory of its own arrays until the process ends.
        self._memory: list[Any] = []

        def allocate(*shape: int) -> DeviceArray:
            self._memory.append(device.allocate(batch_size * prod(shape)))
            return DeviceArray(address_of(self._memory[-1]), (batch_size, *shape))

        self._image = allocate(*artifact.input_size, 3)
        self._binding.bind_input("image", *device.place, np.uint8, self._image.shape, self._image.address)
        self._outputs = {}
        for output in session.get_outputs():
            array = self._outputs[output.name] = allocate(*shapes[output.name])
            self._binding.bind_output(output.name, *device.place, np.uint8, array.shape, array.address)

    def run(self, batch: Batch, compute: Compute = lambda work: work()) -> dict[str, NDArray[np.uint8]]:
        """Return name -> uint8 array of each output for an (N, H, W, 3) uint8 batch.

        A batch in the memory of the device may have fewer images; it is padded with black images.
        """
        target = self._image.address
        if isinstance(batch, DeviceArray):
            self._device.copy(target, batch.address, batch.nbytes, self._stream)
            black = np.zeros((len(self._image) - len(batch), *batch.shape[1:]), np.uint8)
            if black.size:
                self._device.copy(target + batch.nbytes, black.ctypes.data, black.nbytes, self._stream)
        else:
            batch = np.ascontiguousarray(batch)
            self._device.copy(target, batch.ctypes.data, batch.nbytes, self._stream)
        self._device.wait(self._stream)
        compute(self.compute)
        found = {name: self._arena.empty(value.shape) for name, value in self._outputs.items()}
        for name, array in found.items():
            self._device.copy(array.ctypes.data, self._outputs[name].address, array.nbytes, self._stream)
        self._device.wait(self._stream)
        return found

    def compute(self) -> None:
        """Run the session on the content of the buffers; the outputs are complete, on the device, when this returns."""
        self._session.run_with_iobinding(self._binding, self._options)

    def warm_up(self, compute: Compute) -> dict[str, NDArray[np.uint8]]:
        """Run two batches, and return the outputs of the second.

        The first run captures a CUDA graph; from the second on, the graph is launched.
        """
        batch = np.random.default_rng(0).integers(0, 256, self._image.shape, np.uint8)
        self.run(np.zeros_like(batch), compute)
        return self.run(batch, compute)


def open_gpu(number: int) -> CudaDevice:
    """Return a GPU by number; call `cloudrt.engines.libraries.load_libraries` first."""
    name = next(name for name in cuda_libraries(cuda_major()) if "cudart" in name)
    return CudaDevice(number, ctypes.CDLL(str(find_library(name) or name)))
