"""How to run an artifact on this machine: measured once, cached, and recorded with every run.

    providers that can run here -> those that agree with ONNX Runtime CPU fp32 -> the fastest, at its best batch

Measurements are cached in the user's cache folder, keyed by the artifact's bytes, the machine and the versions.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cloudrt.engines.availability import NAMES
from cloudrt.engines.base import BATCH_SIZES, EngineOptions
from cloudrt.engines.choice import hindrance, require
from cloudrt.engines.measurements import Known
from cloudrt.engines.trial import Ladder, ProviderTrial, Rung, best_rung
from cloudrt.errors import MemoryExhausted, ProviderError
from cloudrt.model.artifact import Artifact
from cloudrt.options import RunOptions
from cloudrt.system.machine import usable_cpus
from cloudrt.system.nvidia import nvidia_driver

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How an artifact is run.

    Parameters
    ----------
    provider
        One of `cloudrt.options.PROVIDERS`, never "auto".
    batch_size, streams, compute_precision, cuda_graph
        See `EngineOptions`.
    images_per_s
        Of the network alone, the highest measured; 0 where nothing was measured.
    passed_over
        The providers that were not chosen, with the reason for each.
    """

    provider: str
    batch_size: int
    streams: int = 1
    compute_precision: str = "fp32"
    cuda_graph: bool = False
    images_per_s: float = 0.0
    passed_over: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """Return the plan in words."""
        words = [f"provider {self.provider}", f"batch {self.batch_size}"]
        words += [f"{self.streams} streams"] if self.streams > 1 else []
        words += [f"computing in {self.compute_precision}"] if self.provider == "openvino" else []
        words += ["CUDA graph"] if self.cuda_graph else []
        return ", ".join(words)

    def satisfies(self, options: RunOptions) -> bool:
        """Whether it is what `options` ask for."""
        streams, graph = _fixed(options, self.provider)
        return (
            options.provider in ("auto", self.provider)
            and options.batch_size in (0, self.batch_size)
            and options.compute_precision in ("auto", self.compute_precision)
            and streams in (0, self.streams)
            and graph in (None, self.cuda_graph)
        )

    def options(self, device: int = 0, allow_cpu: bool = False) -> EngineOptions:
        """Return the options of its engine on a device."""
        return EngineOptions(
            streams=self.streams,
            compute_precision=self.compute_precision,
            cuda_graph=self.cuda_graph,
            device=device,
            allow_cpu=allow_cpu,
            keep_compiled=True,
        )


def make_plan(
    model: onnx.ModelProto, artifact: Artifact, sha256: str, options: RunOptions, settled: Plan | None = None
) -> Plan:
    """Return how to run an artifact; measures what was not measured before on this machine.

    "auto" prefers TensorRT or CUDA to any CPU provider, and of the CPU providers takes the one that measured fastest,
    provided that it agrees with ONNX Runtime's CPU provider in fp32. A TensorRT engine that exists is used; none is
    built.

    Parameters
    ----------
    model, artifact, sha256
        The model, its description, and the digest of its file.
    options
        What the user asks for.
    settled
        The plan of a run that is resumed: it is checked, and nothing is measured.

    Raises
    ------
    ProviderError
        The provider asked for cannot run here (names what to install), would only emulate the artifact's int8 layers,
        or is given options of another provider.
    """
    require(options.provider, artifact)
    if settled:
        require(settled.provider, artifact)
    _check_devices(options, settled.provider if settled else options.provider)
    if options.compute_precision != "auto":
        if options.provider != "openvino":
            raise ProviderError(f"--compute-precision {options.compute_precision} needs --provider openvino")
        _check_precision(options.compute_precision)
    if settled:
        return settled
    threads = options.threads or usable_cpus()
    measurements = _Measurements(model, artifact, options, Known(sha256, threads, options.allow_cpu))
    if options.provider != "auto":
        return measurements.plan(options.provider, measurements.precision(options.provider), alone=True)
    return _take_the_fastest(measurements, artifact)


def _fixed(options: RunOptions, provider: str) -> tuple[int, bool | None]:
    """Return the streams and the CUDA graph that the options fix for a provider; 0 and None where they are free."""
    if provider == "cpu":
        return 1, False
    if provider == "openvino":
        return options.openvino.streams, False
    chosen = options.tensorrt if provider == "tensorrt" else options.cuda
    return (1 if chosen.graph else chosen.streams), chosen.graph


def _check_precision(precision: str) -> None:
    """Refuse what the CPU has no instructions for before anything is measured."""
    from cloudrt.engines.openvino import native_precisions

    native = native_precisions()
    if precision not in native:
        raise ProviderError(f"this CPU has no instructions for {precision}, only for {', '.join(native)}")


def _check_devices(options: RunOptions, provider: str) -> None:
    """Refuse GPUs that do not exist, and GPUs of different models, whose last bits differ."""
    if options.devices == (0,):
        return
    if provider in ("cpu", "openvino"):
        raise ProviderError(f"--devices are GPUs: --provider {provider} runs on none")
    driver = nvidia_driver()
    gpus = driver.gpus if driver else ()
    missing = [str(device) for device in options.devices if device >= len(gpus)]
    if missing:
        raise ProviderError(f"no GPU {', '.join(missing)} here: this process may use {len(gpus)}")
    kinds = sorted({gpus[device] for device in options.devices})
    if len(kinds) > 1:
        raise ProviderError(f"--devices of several kinds ({'; '.join(kinds)}): give each kind a run of its own")


def _take_the_fastest(measurements: _Measurements, artifact: Artifact) -> Plan:
    precisions, passed_over = _find_candidates(measurements, artifact)
    plans: list[Plan] = []
    for provider, precision in precisions.items():
        try:
            plans.append(measurements.plan(provider, precision, alone=len(precisions) == 1))
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


def _find_candidates(measurements: _Measurements, artifact: Artifact) -> tuple[dict[str, str], dict[str, str]]:
    """Return provider -> compute precision of those that can run and agree, and the reason against each other one."""
    precisions: dict[str, str] = {}
    passed_over: dict[str, str] = {}
    for provider in NAMES:
        if provider in ("openvino", "cpu") and {"tensorrt", "cuda"} & set(precisions):
            break
        reason = hindrance(provider, artifact)
        if reason is None and provider == "tensorrt" and not measurements.has_tensorrt_engine():
            reason = "its engine would take minutes to build: ask for it with --provider tensorrt"
        if reason is None:
            try:
                precision = measurements.precision(provider)
                reason = measurements.disagreement(provider, precision)
            except MemoryExhausted as error:
                reason = str(error)
        if reason:
            passed_over[provider] = reason
        else:
            precisions[provider] = precision
    return precisions, passed_over


class _Measurements:
    """The measurements of one artifact, each taken once."""

    def __init__(self, model: onnx.ModelProto, artifact: Artifact, options: RunOptions, known: Known) -> None:
        self._model, self._artifact, self._options, self._known = model, artifact, options, known
        self._trial: ProviderTrial | None = None

    def precision(self, provider: str) -> str:
        """Return what a provider computes in: what is asked for, or the fastest that agrees."""
        if provider != "openvino":
            return "fp32"
        if self._options.compute_precision != "auto":
            return self._options.compute_precision
        from cloudrt.engines.openvino import native_precisions

        native = native_precisions()
        # An fp32 artifact asks for fp32.
        for precision in {"fp16": ("fp16", "bf16"), "int8": ("bf16",)}.get(self._artifact.precision, ()):
            if precision in native and self.disagreement(provider, precision) is None:
                return precision
        return "fp32"

    def has_tensorrt_engine(self) -> bool:
        from cloudrt.engines.onnxruntime import tensorrt_engine_exists

        size = self._options.batch_size or BATCH_SIZES["tensorrt"]
        content = self._model.SerializeToString()
        return all(tensorrt_engine_exists(self._artifact, size, content, device) for device in self._options.devices)

    def disagreement(self, provider: str, precision: str) -> str | None:
        """See `ProviderTrial.disagreement`; ONNX Runtime's CPU provider is the reference."""
        if provider == "cpu":
            return None
        key = f"agreement of {provider} {precision}"
        reason = self._known.get(key)
        if key not in self._known or not (reason is None or isinstance(reason, str)):
            reason = self._open_trial().disagreement(provider, precision)
            self._known.put(key, reason)
        return reason

    def plan(self, provider: str, precision: str, *, alone: bool) -> Plan:
        """Return the fastest way to run a provider; nothing is measured where only one way remains.

        `alone` says that no other provider competes.
        """
        asked = self._options.batch_size or (BATCH_SIZES["tensorrt"] if provider == "tensorrt" else 0)
        if asked and provider == "cpu" and alone:
            return Plan(provider, asked)
        streams, graph = _fixed(self._options, provider)
        key = f"rate of {provider} {precision}, batch {asked or 'free'}, streams {streams or 'free'}, graph {graph}"
        rungs = Rung.read(self._known.get(key))
        if not rungs:
            rungs = self._open_trial().climb(provider, precision, Ladder(asked, streams, graph))
            if rungs:  # memory that is short now may be free next time
                self._known.put(key, [rung.to_dict() for rung in rungs])
        best = best_rung(rungs)
        if best is None:
            raise MemoryExhausted(f"{provider} has no memory for {asked or 1} images: use a smaller --batch-size")
        fastest = max(rung.images_per_s for rung in rungs)
        return Plan(provider, best.batch_size, best.streams, precision, best.cuda_graph, fastest)

    def _open_trial(self) -> ProviderTrial:
        if self._trial is None:
            logger.info("Measuring how this model runs best here, once per model and machine: up to half a minute")
            options = self._options
            self._trial = ProviderTrial(
                self._model, self._artifact, options.threads or usable_cpus(), options.devices[0], options.allow_cpu
            )
        return self._trial
