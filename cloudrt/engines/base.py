"""The engine protocol, its options, and checks that every engine shares."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import DataError
from cloudrt.model.artifact import Artifact

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)

PROVIDERS = ("auto", "tensorrt", "cuda", "openvino", "cpu")
BATCH_SIZES = {"tensorrt": 32, "cuda": 32, "openvino": 4, "cpu": 4}
"""Images a batch where none is asked for and nothing was measured."""
COMPUTES = ("f32", "bf16", "f16")
"""What OpenVINO may compute in."""


@dataclass(frozen=True)
class EngineOptions:
    """What changes an engine's speed and, in the last bits, its answers.

    Parameters
    ----------
    streams
        Batches that it runs at once, each from a thread of its own.
    compute
        Of `COMPUTES`, for OpenVINO: what the layers compute in. The other providers follow the artifact's precision.
    cuda_graph
        CUDA and TensorRT: record the kernels of a batch once and launch them as one; needs a fixed batch.
    device
        Number of the GPU.
    allow_cpu
        Let heavy nodes run on the CPU although a GPU was asked for.
    emulate
        On ONNX Runtime's CPU provider, compute what a device would that is not here, slowly: a fp16 graph is not
        widened, and int8 layers compute in float between their roundings. For comparisons.
    keep_compiled
        Keep what OpenVINO compiles in the user's cache, for the next start.
    """

    streams: int = 1
    compute: str = "f32"
    cuda_graph: bool = False
    device: int = 0
    allow_cpu: bool = False
    emulate: bool = False
    keep_compiled: bool = False

    def __post_init__(self) -> None:
        if self.streams < 1 or self.device < 0:
            raise DataError(f"at least one stream, and devices from 0 on: found {self.streams} and {self.device}")
        if self.compute not in COMPUTES:
            raise DataError(f"compute is one of {', '.join(COMPUTES)}, found {self.compute!r}")
        if self.cuda_graph and self.streams > 1:
            raise DataError("a CUDA graph runs one batch at a time: give it one stream")


class Engine(Protocol):
    """An artifact, loaded. A context manager; `streams` threads may call `probability` and `run` at once.

    Parameters
    ----------
    provider
        Of `PROVIDERS`, never "auto".
    artifact
        What it runs.
    batch_size
        The fixed N of its input, or None where any N goes.
    streams
        See `EngineOptions`.
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


def check_batch(batch: NDArray[np.uint8], artifact: Artifact, batch_size: int | None) -> None:
    """Refuse a batch that the engine was not loaded for.

    Raises
    ------
    DataError
        Another dtype, image size or batch size.
    """
    expected = (batch_size or len(batch), *artifact.input_size, 3)
    if batch.dtype != np.uint8 or batch.shape != expected:
        raise DataError(f"the engine takes uint8 images of shape {expected}, found {batch.dtype} {batch.shape}")
