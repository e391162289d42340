"""The engine protocol, its options, and checks that every engine shares."""

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

BATCH_SIZES = {"tensorrt": 32, "tensorrt-rtx": 32, "cuda": 32, "openvino": 4, "cpu": 4}
"""Images a batch where none is asked for and nothing was measured."""


@dataclass(frozen=True)
class EngineOptions:
    """How an engine computes, once everything is chosen: what a `Plan` and a device give.

    Parameters
    ----------
    streams
        Batches in flight at once, each submitted from its own thread.
    compute_precision
        "fp32", "bf16" or "fp16": what OpenVINO computes in. The other providers follow the artifact's precision.
    cuda_graph
        GPU providers: capture the kernels of a batch once and launch them as one; needs a fixed batch.
    channels_last
        CUDA: convolutions in NHWC layout with their bias fused.
    pinned
        CUDA and TensorRT: copy batches from and to page-locked memory, beside computing; else ONNX Runtime copies them.
    device
        GPU number.
    allow_cpu
        See `RunOptions`.
    emulate
        ONNX Runtime's CPU provider computes what an absent device would, slowly: a fp16 graph is not widened, and int8
        layers compute in float between their roundings. Used by parity checks.
    keep_compiled
        Keep the network that OpenVINO compiles in the user's cache, for the next start.
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
            raise DataError(f"at least one stream, and devices from 0 on: found {self.streams} and {self.device}")
        check_name("compute precision", self.compute_precision, PRECISIONS[1:])
        if self.cuda_graph and self.streams > 1:
            raise DataError("a CUDA graph runs one batch at a time: use one stream with it")
        if self.cuda_graph and not self.pinned:
            raise DataError("a CUDA graph needs buffers that stay: use pinned copies with it")


class Engine(Protocol):
    """An artifact loaded into a runtime. A context manager; `streams` threads may call `run` concurrently.

    Parameters
    ----------
    provider
        One of `cloudrt.options.PROVIDERS`, never "auto".
    artifact
        The description of the model.
    batch_size
        The fixed N of the input, or None where any N is accepted.
    streams
        How many threads may run a batch at once: as many as are computed at once, and on a GPU one that is copied.
    """

    provider: str
    artifact: Artifact
    batch_size: int | None
    streams: int

    def run(self, batch: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Return probability (N, C, W_out, H_out) and presence (N, C), or None, of (N, H, W, 3) uint8 RGB images.

        Raises
        ------
        DataError
            A batch of another dtype or shape.
        MemoryExhausted, ProviderError
            The batch does not fit into memory; the provider failed on it.
        """
        ...

    def probability(self, batch: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the probability alone."""
        ...

    def empty(self, batches: int) -> NDArray[np.uint8]:
        """Return an array for the images of some batches, (n, H, W, 3), not initialised: the best form for `run`."""
        ...

    def close(self) -> None:
        """Release the provider's memory."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


DEFAULTS = EngineOptions()


def exhausted(error: Exception) -> bool:
    """Whether a runtime's error says that memory ran out."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = (
    *("out of memory", "failed to allocate", "bad_alloc", "bad allocation", "not enough memory", "available memory"),
    *("cudaerrormemoryallocation", "cublas_status_alloc_failed", "cudnn_status_alloc_failed", "outofmemory"),
)
"""How CUDA, cuDNN, cuBLAS, TensorRT, ONNX Runtime's arena, OpenVINO and C++ say it."""


def brief(error: Exception) -> str:
    """Return one of ONNX Runtime's errors in a few words, without the places in its source."""
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
    """Refuse a batch that the engine was not loaded for.

    Raises
    ------
    DataError
        Another dtype, image size or batch size.
    """
    expected = (batch_size or len(batch), *artifact.input_size, 3)
    if isinstance(batch, DeviceArray) and len(batch) < expected[0]:  # filled up there
        expected = (len(batch), *expected[1:])
    if batch.dtype != np.uint8 or batch.shape != expected:
        raise DataError(f"the engine takes uint8 images of shape {expected}, found {batch.dtype} {batch.shape}")
