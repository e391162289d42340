"""What an engine is, and which one `auto` takes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from cloudrt.artifact import Artifact, load_model, parse_artifact
from cloudrt.cpus import usable_cpus
from cloudrt.engines.availability import problem
from cloudrt.errors import DataError, ProviderError

if TYPE_CHECKING:
    import onnx

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


@dataclass(frozen=True)
class Choice:
    """The provider taken, and why not the faster ones: name -> reason."""

    provider: str
    passed_over: dict[str, str]


def choose_provider(wanted: str = "auto", artifact: Artifact | None = None) -> Choice:
    """Return the provider to run, an artifact of one's own or, without one, any.

    Nothing is measured: `auto` takes CUDA where it works, else ONNX Runtime's CPU provider. TensorRT spends minutes
    building an engine for each artifact, and OpenVINO is faster on some processors and slower on others;
    `cloudrt.engines.plan` measures.

    Raises
    ------
    ProviderError
        The one asked for cannot run here, and says what to install; or would only emulate the artifact's int8 layers.
    """
    require(wanted, artifact)
    if wanted != "auto":
        return Choice(wanted, {})
    passed_over = {
        "tensorrt": problem("tensorrt") or "builds its engine for minutes; ask for it with --provider tensorrt"
    }
    reason = hindrance("cuda", artifact)
    if reason is None:
        return Choice("cuda", passed_over)
    passed_over["cuda"] = reason
    passed_over["openvino"] = problem("openvino") or "faster on some processors only; try it with --provider openvino"
    reason = emulation("cpu", artifact)
    if reason:
        raise ProviderError(f"no provider here runs this artifact: {reason}")
    return Choice("cpu", passed_over)


def require(wanted: str, artifact: Artifact | None = None) -> None:
    """Refuse a provider that cannot run an artifact here; see `choose_provider` for the errors."""
    if wanted not in PROVIDERS:
        raise ProviderError(f"no provider named {wanted!r}: {', '.join(PROVIDERS)}")
    if wanted == "auto":
        return
    reason = problem(wanted)
    if reason:
        raise ProviderError(f"--provider {wanted} cannot run here: {reason}")
    reason = emulation(wanted, artifact)
    if reason:
        raise ProviderError(f"--provider {wanted} is refused for this artifact: {reason}")


def hindrance(provider: str, artifact: Artifact | None = None) -> str | None:
    """Return why a provider cannot run an artifact here, or None."""
    return problem(provider) or emulation(provider, artifact)


def emulation(provider: str, artifact: Artifact | None) -> str | None:
    """Return why `provider` would only emulate the int8 layers of an artifact, slower than fp32; None where it has
    kernels for them."""
    if artifact is None or artifact.precision != "int8":
        return None
    if provider == "cuda":
        return "ONNX Runtime has no int8 convolutions on CUDA and would compute in float: use the fp16 artifact"
    if artifact.int8_target == "tensorrt" and provider != "tensorrt":
        return "its int8 layers are laid out for TensorRT: export one with --int8-target cpu"
    if artifact.int8_target == "cpu" and provider == "tensorrt":
        return "TensorRT takes no asymmetric int8: export one with --int8-target tensorrt"
    return None


def open_engine(
    model: str | Path | onnx.ModelProto,
    provider: str = "auto",
    batch_size: int | None = 0,
    threads: int = 0,
    options: EngineOptions = DEFAULTS,
) -> Engine:
    """Load an artifact into the engine of a provider.

    Parameters
    ----------
    model
        The artifact's path, or the artifact loaded.
    provider
        Of `PROVIDERS`; `auto` is that of `choose_provider`, which measures nothing.
    batch_size
        The fixed N of every batch; 0 takes the provider's default; None leaves it free.
    threads
        CPU threads inside the engine; 0 is all that this process may use.
    options
        Everything else.

    Raises
    ------
    ArtifactError, ProviderError
        The model cannot be used, or the provider cannot run here.
    """
    if batch_size is not None and batch_size < 0:
        raise DataError(f"the batch size is at least 1, found {batch_size}")
    name = model if isinstance(model, str | Path) else "the model"
    loaded = load_model(model) if isinstance(model, str | Path) else model
    artifact = parse_artifact(loaded, name)
    chosen = choose_provider(provider, None if options.emulate else artifact).provider
    size = BATCH_SIZES[chosen] if batch_size == 0 else batch_size
    threads = threads or usable_cpus()
    if chosen == "openvino":
        from cloudrt.engines.openvino import OpenvinoEngine

        return OpenvinoEngine(loaded, artifact, size, threads, options)
    from cloudrt.engines.onnxruntime import OrtEngine

    return OrtEngine(loaded, artifact, chosen, size, threads, options)


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
