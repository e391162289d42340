"""The engine protocol, its options, and functions that all engines share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import DataError
from cloudrt.model.artifact import Artifact
from cloudrt.options import PRECISIONS
from cloudrt.system.cuda import Batch, DeviceArray
from cloudrt.system.suggest import check_name

DIAGNOSIS = "cloudrt doctor checks the driver and the libraries"
"""The remedy in errors of GPUs."""
BATCH_SIZES = {"tensorrt": 32, "tensorrt-rtx": 32, "cuda": 32, "openvino": 4, "cpu": 4}
"""Number of images per batch, by provider, if it is neither given nor measured."""


@dataclass(frozen=True)
class EngineOptions:
    """How an engine computes: the settings of a `Plan`, for one device.

    Parameters
    ----------
    streams
        Number of batches computed at once, each submitted by its own thread.
    compute_precision
        "fp32", "bf16" or "fp16": what OpenVINO computes in. The other providers use the artifact's precision, except
        that ONNX Runtime's CPU provider computes fp16 artifacts in fp32; see `emulate`.
    cuda_graph
        GPU providers: capture the kernels of a batch once and launch them together; needs a fixed batch size.
    channels_last
        CUDA: convolutions run in NHWC layout with their bias fused.
    pinned
        CUDA and TensorRT: batches are copied from and to page-locked memory while other batches are computed. If False,
        ONNX Runtime copies them.
    device
        GPU number.
    allow_cpu
        See `RunOptions`.
    emulate
        For parity checks: ONNX Runtime's CPU provider computes with the rounding of another device, slowly. An fp16
        graph is not converted to float32, and int8 layers compute in float between quantisation and dequantisation.
    keep_compiled
        Store the network that OpenVINO compiles in the user's cache, for the next start.

    Raises
    ------
    DataError
        An unknown precision, a number out of range, or a CUDA graph with several streams or without `pinned`.
    """

    streams: int = 1
    compute_precision: str = "fp32"
    cuda_graph: bool = False
    channels_last: bool = False
    pinned: bool = True
    device: int = 0
    allow_cpu: bool = False
    emulate: bool = False
    keep_compiled: bool = False

    def __post_init__(self) -> None:
        if self.streams < 1 or self.device < 0:
            raise DataError(f"streams must be at least 1 and device at least 0, found {self.streams} and {self.device}")
        check_name("compute precision", self.compute_precision, PRECISIONS[1:])
        if self.cuda_graph and self.streams > 1:
            raise DataError("a CUDA graph runs one batch at a time: use one stream with it")
        if self.cuda_graph and not self.pinned:
            raise DataError("a CUDA graph needs buffers with fixed addresses: use pinned=True with it")


class Engine(Protocol):
    """An artifact loaded into a runtime. A context manager; `streams` threads may call `run` concurrently.

    Parameters
    ----------
    provider
        One of `cloudrt.options.PROVIDERS`, never "auto"; or "remote".
    artifact
        The metadata of the model.
    batch_size
        The fixed N of the input, or None if any N is accepted.
    streams
        Number of threads that may call `run` at once: the number of batches computed at once and, with `pinned` buffers
        on a GPU, one more that is being copied.
    """

    provider: str
    artifact: Artifact
    batch_size: int | None
    streams: int

    def run(self, batch: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Return probability (N, C, W_out, H_out) and presence (N, C), uint8, of (N, H, W, 3) uint8 RGB images.

        The presence is None if the artifact has no such output.

        Raises
        ------
        DataError
            A batch of a wrong dtype or shape.
        MemoryExhausted, ProviderError
            The batch does not fit into memory; the provider failed on it.
        """
        ...

    def probability(self, batch: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the probability alone."""
        return self.run(batch)[0]

    def empty(self, batches: int) -> NDArray[np.uint8]:
        """Return an uninitialised (n, H, W, 3) uint8 array for `batches` batches, in memory that `run` reads fast."""
        return np.empty((batches * (self.batch_size or 1), *self.artifact.input_size, 3), np.uint8)

    def close(self) -> None:
        """Release the memory of the engine."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


DEFAULTS = EngineOptions()


def exhausted(error: Exception) -> bool:
    """Return whether an error of a runtime means that memory ran out."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = (
    *("out of memory", "failed to allocate", "bad_alloc", "bad allocation", "not enough memory", "available memory"),
    *("cudaerrormemoryallocation", "cublas_status_alloc_failed", "cudnn_status_alloc_failed", "outofmemory"),
)
"""Parts of the out-of-memory messages of CUDA, cuDNN, cuBLAS, TensorRT, ONNX Runtime, OpenVINO and C++."""


def brief(error: Exception) -> str:
    """Return the message of an ONNX Runtime error, shortened: one line without status and source locations."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    failure = _FAILURE.search(line)
    if failure:
        return failure[0].strip()
    return _PLACE.sub("", _PLACE.sub("", line)) or line


_FAILURE = re.compile(r"(?:CUDA|CUDNN|CUBLAS|CURAND|CUFFT) failure \d+: [^;]*")
_PLACE = re.compile(
    r"^\[ONNXRuntimeError\] : \d+ : \w+ : |"  # the status
    r"^\S+\.(?:cc|h|cpp):\d+ [^()]*\(.*?\)(?: const)?(?: \[with [^\]]*\])? "  # file, line and function
)


def check_batch(batch: Batch, artifact: Artifact, batch_size: int | None) -> None:
    """Raise DataError unless the batch has the dtype and shape that the engine was loaded for."""
    expected = (batch_size or len(batch), *artifact.input_size, 3)
    if isinstance(batch, DeviceArray) and len(batch) < expected[0]:  # a smaller batch is padded on the device
        expected = (len(batch), *expected[1:])
    if batch.dtype != np.uint8 or batch.shape != expected:
        raise DataError(f"the engine needs uint8 images of shape {expected}, found {batch.dtype} {batch.shape}")
