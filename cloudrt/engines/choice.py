"""Choice of a provider, and opening an artifact in its engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cloudrt.engines.availability import problem
from cloudrt.engines.base import BATCH_SIZES, DEFAULTS, Engine, EngineOptions
from cloudrt.errors import DataError, ProviderError
from cloudrt.model.artifact import Artifact, parse_artifact
from cloudrt.model.onnx_file import load_model
from cloudrt.options import PROVIDERS, TENSORRT_PROVIDERS
from cloudrt.system.machine import usable_cpus

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Choice:
    """The chosen provider; for "auto", also the providers before it in `PROVIDERS`, each with why it was not chosen."""

    provider: str
    passed_over: dict[str, str]


def choose_provider(wanted: str = "auto", artifact: Artifact | None = None) -> Choice:
    """Choose a provider without measuring: "auto" takes CUDA if it works, else ONNX Runtime's CPU provider.

    "auto" does not take TensorRT, which needs minutes to build an engine for each artifact, TensorRT for RTX, which
    needs seconds to compile, or OpenVINO, which is faster on some processors and slower on others.
    `cloudrt.engines.plan` chooses by measurement.

    Parameters
    ----------
    wanted
        One of `PROVIDERS`.
    artifact
        The artifact to run; None skips the checks that depend on it.

    Raises
    ------
    ProviderError
        An unknown provider, or one that cannot run on this machine (the message says what to install) or has no int8
        kernels for the artifact's int8 layers; for "auto", no provider can run the artifact.
    """
    require(wanted, artifact)
    if wanted != "auto":
        return Choice(wanted, {})
    passed_over = {
        "tensorrt": problem("tensorrt") or "building its engine takes minutes; request provider tensorrt to run it",
        "tensorrt-rtx": problem("tensorrt-rtx")
        or "it compiles the network at start; request provider tensorrt-rtx to run it",
    }
    reason = artifact_problem("cuda", artifact)
    if reason is None:
        return Choice("cuda", passed_over)
    passed_over["cuda"] = reason
    passed_over["openvino"] = (
        problem("openvino") or "faster on some processors only; request provider openvino to try it"
    )
    reason = int8_problem("cpu", artifact)
    if reason:
        raise ProviderError(f"no provider here runs this artifact: {reason}")
    return Choice("cpu", passed_over)


def require(wanted: str, artifact: Artifact | None = None) -> None:
    """Raise ProviderError if a provider cannot run an artifact on this machine; see `choose_provider`."""
    if wanted not in PROVIDERS:
        raise ProviderError(f"no provider named {wanted!r}; known: {', '.join(PROVIDERS)}")
    if wanted == "auto":
        return
    reason = problem(wanted)
    if reason:
        raise ProviderError(f"provider {wanted} cannot run here: {reason}")
    reason = int8_problem(wanted, artifact)
    if reason:
        raise ProviderError(f"provider {wanted} is refused for this artifact: {reason}")


def artifact_problem(provider: str, artifact: Artifact | None = None) -> str | None:
    """Return why a provider cannot run an artifact on this machine, or None if it can."""
    return problem(provider) or int8_problem(provider, artifact)


def int8_problem(provider: str, artifact: Artifact | None) -> str | None:
    """Return why `provider` is not used for an int8 artifact, or None if it has kernels for the artifact's layers.

    Without int8 kernels, it would compute the layers in float, slower than an fp32 artifact, or refuse them.
    """
    if artifact is None or artifact.precision != "int8":
        return None
    if provider == "cuda":
        return "ONNX Runtime has no int8 convolutions on CUDA and would compute in float: use the fp16 artifact"
    on_tensorrt = provider in TENSORRT_PROVIDERS
    if artifact.int8_target == "tensorrt" and not on_tensorrt:
        return "its int8 layers are quantised for TensorRT: export it with cloudrt-export --int8-target cpu"
    if artifact.int8_target == "cpu" and on_tensorrt:
        return "TensorRT does not support asymmetric int8: export it with cloudrt-export --int8-target tensorrt"
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
        Path of the artifact, or the loaded artifact.
    provider
        One of `PROVIDERS`; "auto" is resolved by `choose_provider`.
    batch_size
        The fixed N of every batch; 0 takes the provider's value of `BATCH_SIZES`; None accepts any N.
    threads
        Number of CPU threads of the engine; 0 uses all cores that this process may use.
    options
        All other settings.

    Raises
    ------
    ArtifactError, ProviderError
        The model cannot be used, or the provider cannot run on this machine.
    DataError
        A negative batch size, or a CUDA graph without a fixed one.
    """
    if batch_size is not None and batch_size < 0:
        raise DataError(f"the batch size must be 0 or more, found {batch_size}")
    if batch_size is None and options.cuda_graph:
        raise DataError("a CUDA graph needs a fixed batch size, found None")
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
