"""Check that TensorRT accepts an artifact: TensorRT for RTX parses it and builds its engines, without a GPU or driver.

The engines are not run, so the check does not cover their results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from time import perf_counter
from typing import Any

import onnx

from cloudrt.engines.base import BATCH_SIZES
from cloudrt.errors import ArtifactError, ProviderError
from cloudrt.model.artifact import Artifact
from cloudrt.model.onnx_file import graph_bytes
from cloudrt.system.versions import install_command

TARGETS = ("sm86", "sm89", "sm120")
"""GPU architectures to build for: GeForce RTX 30, 40 and 50, and the workstation GPUs of these generations."""
MODULE = "tensorrt_rtx_bindings"
INSTALL = install_command("tensorrt-check")
SHOWN = 3
"""Largest number of TensorRT's messages in an error."""


@dataclass(frozen=True)
class TensorrtEngine:
    """An engine that was built.

    Parameters
    ----------
    target
        One of `TARGETS`.
    bytes
        Size of the engine.
    seconds
        Time to build it.
    """

    target: str
    bytes: int
    seconds: float


@dataclass(frozen=True)
class TensorrtCheck:
    """The result of `check`.

    Parameters
    ----------
    version
        Version of TensorRT for RTX.
    layers
        Number of layers of the parsed network.
    engines
        One engine per target.
    """

    version: str
    layers: int
    engines: tuple[TensorrtEngine, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


def is_installed() -> bool:
    """Return whether TensorRT for RTX and its Python bindings are installed."""
    return find_spec(MODULE) is not None and find_spec("tensorrt_rtx_libs") is not None


def require_tensorrt() -> None:
    """Raise ProviderError if TensorRT for RTX is not installed; the message says how to install it."""
    if not is_installed():
        raise ProviderError(f"TensorRT for RTX is not installed: {INSTALL}")


def check(
    model: onnx.ModelProto,
    artifact: Artifact,
    batch_size: int = BATCH_SIZES["tensorrt-rtx"],
    targets: Sequence[str] = TARGETS,
) -> TensorrtCheck:
    """Parse an artifact as a strongly typed network, and build an engine of a fixed batch size for each target.

    Raises
    ------
    ArtifactError
        The parser or the builder of TensorRT refuses the artifact, or an input or output is not uint8 in TensorRT.
    ProviderError
        TensorRT for RTX is not installed.
    """
    require_tensorrt()
    import tensorrt_rtx_bindings as trt

    log = _log()
    log.messages.clear()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph_bytes(model)):
        errors = [parser.get_error(number) for number in range(parser.num_errors)]
        raise ArtifactError(f"TensorRT's parser refuses the model: {_join([_describe(one) for one in errors])}")
    tensors = [network.get_input(number) for number in range(network.num_inputs)]
    tensors += [network.get_output(number) for number in range(network.num_outputs)]
    for tensor in tensors:
        if tensor.dtype != trt.uint8:
            raise ArtifactError(f"TensorRT parses {tensor.name} as {tensor.dtype}, expected uint8")
    profile = builder.create_optimization_profile()
    shape = (batch_size, *artifact.input_size, 3)
    profile.set_shape("image", shape, shape, shape)
    engines = []
    for target in targets:
        config = builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
        config.add_optimization_profile(profile)
        began = perf_counter()
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise ArtifactError(f"TensorRT cannot build an engine for {target}: {_join(log.messages)}")
        engines.append(TensorrtEngine(target, engine.nbytes, perf_counter() - began))
    return TensorrtCheck(str(trt.__version__), network.num_layers, tuple(engines))


@cache
def _log() -> Any:
    """Return the logger of this process, which collects TensorRT's errors in `messages`.

    TensorRT uses the first logger of a process for all builders.
    """
    import tensorrt_rtx_bindings as trt

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.messages.append(message)

    return Log()


def _describe(error: Any) -> str:
    where = f" ({error.node_operator()} {error.node_name()})" if error.node_operator() else ""
    return f"{error.desc()}{where}"


def _join(messages: Sequence[str]) -> str:
    lines = [" ".join(message.split()) for message in messages if message.strip()]
    return "; ".join(lines[:SHOWN]) or "no reason is given"
