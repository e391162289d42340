"""How to run an artifact on this machine: measured once, remembered, recorded with every run.

    providers that can run here -> those that agree with ONNX Runtime CPU fp32 -> the fastest, at its best batch

What was measured lies in the user's cache folder, keyed by the artifact's bytes, the machine and the versions.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from cloudrt.engines.availability import NAMES
from cloudrt.engines.base import BATCH_SIZES, EngineOptions
from cloudrt.engines.choice import hindrance, require
from cloudrt.engines.measurements import Known
from cloudrt.engines.trial import Bench, Rung, best_rung
from cloudrt.errors import MemoryExhausted, ProviderError
from cloudrt.model.artifact import Artifact
from cloudrt.system.nvidia import nvidia_driver

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What the user asks for: "auto" and 0 leave it to measurement.

    Parameters
    ----------
    provider
        Of `cloudrt.engines.PROVIDERS`.
    batch_size
        Images a batch.
    threads
        CPU threads of an engine, at least 1.
    compute
        "auto", or of `cloudrt.engines.base.COMPUTES`: what OpenVINO computes in.
    devices
        Numbers of the GPUs.
    allow_cpu
        See `EngineOptions`.
    """

    provider: str = "auto"
    batch_size: int = 0
    threads: int = 1
    compute: str = "auto"
    devices: tuple[int, ...] = (0,)
    allow_cpu: bool = False


@dataclass(frozen=True)
class Plan:
    """How an artifact is run.

    Parameters
    ----------
    provider
        Of `cloudrt.engines.PROVIDERS`, never "auto".
    batch_size, streams, compute, cuda_graph
        See `EngineOptions`.
    images_per_s
        Of the network alone, the highest that was measured; 0 where nothing was.
    passed_over
        The providers that tend to be faster, or were measured, and why they were not taken.
    """

    provider: str
    batch_size: int
    streams: int = 1
    compute: str = "f32"
    cuda_graph: bool = False
    images_per_s: float = 0.0
    passed_over: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """Return the plan in words."""
        words = [f"provider {self.provider}", f"batch {self.batch_size}"]
        words += [f"{self.streams} streams"] if self.streams > 1 else []
        words += [f"computing in {self.compute}"] if self.provider == "openvino" else []
        words += ["CUDA graph"] if self.cuda_graph else []
        return ", ".join(words)

    def identity(self) -> dict[str, str | int]:
        """What the answers hang on, for `cloudrt.inference.journal`."""
        return {
            "provider": self.provider,
            "batch size": self.batch_size,
            "streams": self.streams,
            "compute": self.compute,
            "CUDA graph": int(self.cuda_graph),
        }

    @classmethod
    def recorded(cls, identity: Mapping[str, Any]) -> Self:
        """The inverse of `identity`.

        Raises
        ------
        ProviderError
            Another version's record.
        """
        try:
            return cls(
                identity["provider"],
                identity["batch size"],
                identity["streams"],
                identity["compute"],
                bool(identity["CUDA graph"]),
            )
        except KeyError as error:
            raise ProviderError(f"the recorded run does not say its {error}: it is of another version") from error

    def serves(self, request: Request) -> bool:
        """Whether it is what `request` asks for."""
        return (
            request.provider in ("auto", self.provider)
            and request.batch_size in (0, self.batch_size)
            and request.compute in ("auto", self.compute)
        )

    def options(self, device: int = 0, allow_cpu: bool = False) -> EngineOptions:
        """Return the options of its engine on a device."""
        return EngineOptions(self.streams, self.compute, self.cuda_graph, device, allow_cpu, keep_compiled=True)


def make_plan(
    model: onnx.ModelProto, artifact: Artifact, sha256: str, request: Request, settled: Plan | None = None
) -> Plan:
    """Return how to run an artifact; measures what was not measured before on this machine.

    A plan that is `settled`, by a run that is resumed, is only checked.

    `auto` takes TensorRT or CUDA before any CPU, and of the CPU's providers the one that was measured to be fastest,
    if it agrees with ONNX Runtime's CPU provider in fp32. A TensorRT engine that exists is used; none is built.

    Raises
    ------
    ProviderError
        The provider asked for cannot run here, and says what to install; would only emulate the artifact's int8
        layers; or is given options that are not its own.
    """
    require(request.provider, artifact)
    if request.compute != "auto" and request.provider != "openvino":
        raise ProviderError(
            f"what to compute in is OpenVINO's to choose: --compute {request.compute} needs "
            "--provider openvino; other providers follow the artifact's precision"
        )
    if settled:
        require(settled.provider, artifact)
    _check_devices(request, settled.provider if settled else request.provider)
    if request.compute != "auto":
        _check_compute(request.compute)
    if settled:
        return settled
    known = Known(sha256, request.threads, request.allow_cpu)
    trial = _Trial(model, artifact, request, known)
    if request.provider != "auto":
        return trial.plan(request.provider, trial.compute(request.provider), alone=True)
    return _take_the_fastest(trial, artifact)


def _check_compute(compute: str) -> None:
    """Refuse what the CPU has no instructions for before anything is measured."""
    from cloudrt.engines.openvino import fast_computes

    computes = fast_computes()
    if compute not in computes:
        raise ProviderError(f"this CPU has no instructions for {compute}: {', '.join(computes)}")


def _check_devices(request: Request, provider: str) -> None:
    """Refuse GPUs that are not there, and GPUs of several kinds: which image went where would change its last bits."""
    if request.devices == (0,):
        return
    if provider in ("cpu", "openvino"):
        raise ProviderError(f"--devices are GPUs: --provider {provider} runs on none")
    driver = nvidia_driver()
    gpus = driver.gpus if driver else ()
    missing = [str(device) for device in request.devices if device >= len(gpus)]
    if missing:
        raise ProviderError(f"no GPU {', '.join(missing)} here: this process may use {len(gpus)}")
    kinds = sorted({gpus[device] for device in request.devices})
    if len(kinds) > 1:
        raise ProviderError(f"--devices of several kinds ({'; '.join(kinds)}): give each kind a run of its own")


def _take_the_fastest(trial: _Trial, artifact: Artifact) -> Plan:
    computes, passed_over = _find_candidates(trial, artifact)
    plans: list[Plan] = []
    for provider, compute in computes.items():
        try:
            plans.append(trial.plan(provider, compute, alone=len(computes) == 1))
        except MemoryExhausted as error:
            passed_over[provider] = str(error)
    if not plans:
        raise ProviderError(f"no provider here runs this artifact: {'; '.join(passed_over.values())}")
    best = max(plans, key=lambda plan: plan.images_per_s)
    for plan in plans:
        if plan is not best:
            passed_over[plan.provider] = (
                f"{plan.images_per_s:.1f} images/s beside {best.images_per_s:.1f}, as measured here"
            )
    return replace(best, passed_over=passed_over)


def _find_candidates(trial: _Trial, artifact: Artifact) -> tuple[dict[str, str], dict[str, str]]:
    """Return provider -> what it computes in, of those that can run and agree; and why not the others."""
    computes: dict[str, str] = {}
    passed_over: dict[str, str] = {}
    for provider in NAMES:
        if provider in ("openvino", "cpu") and {"tensorrt", "cuda"} & set(computes):
            break
        reason = hindrance(provider, artifact)
        if reason is None and provider == "tensorrt" and not trial.has_tensorrt_engine():
            reason = "its engine would take minutes to build: ask for it with --provider tensorrt"
        if reason is None:
            try:
                compute = trial.compute(provider)
                reason = trial.disagreement(provider, compute)
            except MemoryExhausted as error:
                reason = str(error)
        if reason:
            passed_over[provider] = reason
        else:
            computes[provider] = compute
    return computes, passed_over


class _Trial:
    """The measurements of one artifact, each taken once."""

    def __init__(self, model: onnx.ModelProto, artifact: Artifact, request: Request, known: Known) -> None:
        self._model, self._artifact, self._request, self._known = model, artifact, request, known
        self._bench: Bench | None = None

    def compute(self, provider: str) -> str:
        """Return what a provider is to compute in: what is asked for, or the fastest that agrees."""
        if provider != "openvino":
            return "f32"
        if self._request.compute != "auto":
            return self._request.compute
        from cloudrt.engines.openvino import fast_computes

        fast = fast_computes()
        # Who exports fp32 wants fp32.
        for compute in {"fp16": ("f16", "bf16"), "int8": ("bf16",)}.get(self._artifact.precision, ()):
            if compute in fast and self.disagreement(provider, compute) is None:
                return compute
        return "f32"

    def has_tensorrt_engine(self) -> bool:
        from cloudrt.engines.onnxruntime import tensorrt_engine_exists

        size = self._request.batch_size or BATCH_SIZES["tensorrt"]
        content = self._model.SerializeToString()
        return all(tensorrt_engine_exists(self._artifact, size, content, device) for device in self._request.devices)

    def disagreement(self, provider: str, compute: str) -> str | None:
        """See `Bench.disagreement`; ONNX Runtime's CPU provider is what the others are compared with."""
        if provider == "cpu":
            return None
        key = f"agreement of {provider} {compute}"
        reason = self._known.get(key)
        if key not in self._known or not (reason is None or isinstance(reason, str)):
            self._announce()
            reason = self._open_bench().disagreement(provider, compute)
            self._known.put(key, reason)
        return reason

    def plan(self, provider: str, compute: str, *, alone: bool) -> Plan:
        """Return the fastest way to run a provider; measured only where there is a choice, `alone` being no other
        provider."""
        asked = self._request.batch_size or (BATCH_SIZES["tensorrt"] if provider == "tensorrt" else 0)
        if asked and provider == "cpu" and alone:
            return Plan(provider, asked)
        key = f"rate of {provider} {compute}, batch {asked or 'free'}"
        rungs = Rung.read(self._known.get(key))
        if not rungs:
            self._announce()
            rungs = self._open_bench().climb(provider, compute, asked)
            if rungs:  # memory that lacks today may be there tomorrow
                self._known.put(key, [rung.to_dict() for rung in rungs])
        best = best_rung(rungs)
        if best is None:
            raise MemoryExhausted(f"{provider} has no memory for {asked or 1} images: give a smaller --batch-size")
        fastest = max(rung.images_per_s for rung in rungs)
        return Plan(provider, best.batch_size, best.streams, compute, best.cuda_graph, fastest)

    def _announce(self) -> None:
        if self._bench is None:
            logger.info("Measuring how this model runs best here, once for each model and machine: up to half a minute")

    def _open_bench(self) -> Bench:
        if self._bench is None:
            request = self._request
            self._bench = Bench(self._model, self._artifact, request.threads, request.devices[0], request.allow_cpu)
        return self._bench
