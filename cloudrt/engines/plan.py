"""Plan how to run an artifact on this machine: measured once, cached, and recorded with every run.

    providers that can run here -> those that agree with ONNX Runtime CPU fp32 -> the fastest, at its best batch

Measurements are stored in the user's cache folder, with a key from the artifact's graph, the machine and the versions.
New rules, as written by `cloudrt tune`, do not change the key.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cloudrt.engines.availability import NAMES
from cloudrt.engines.base import BATCH_SIZES, EngineOptions
from cloudrt.engines.choice import hindrance, require
from cloudrt.engines.measurements import MeasurementCache
from cloudrt.engines.trial import Candidate, FixedSettings, ProviderTrial, Setting, best_setting
from cloudrt.errors import ArtifactError, MemoryExhausted, ProviderError
from cloudrt.model.artifact import Artifact, graph_bytes
from cloudrt.options import GPU_PROVIDERS, RunOptions
from cloudrt.system.machine import usable_cpus
from cloudrt.system.nvidia import nvidia_driver

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

MARGIN = 1.1
"""How many times as fast as ONNX Runtime's CUDA or CPU provider another provider must be to be chosen."""
CLEAR = 1.5
"""If two rates, measured one after the other, differ by less than this factor, the plans are timed alternately."""
Samples = Callable[[], NDArray[np.uint8]]
"""Returns images of the user, (N, H, W, 3) uint8, on which the outputs of providers are compared."""


@dataclass(frozen=True)
class Plan:
    """How an artifact is run.

    Parameters
    ----------
    provider
        One of `cloudrt.options.PROVIDERS`, never "auto"; or "remote", for the servers of `RemoteOptions`.
    batch_size, streams, compute_precision, cuda_graph, channels_last, pinned
        See `EngineOptions`.
    images_per_s
        Highest measured rate of the network alone; 0 if nothing was measured.
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
    channels_last: bool = False
    pinned: bool = True

    def describe(self) -> str:
        """Return the plan as text, such as "provider cuda, batch 32, 2 streams"."""
        words = [f"provider {self.provider}", f"batch {self.batch_size}"]
        words += [f"{self.streams} streams"] if self.streams > 1 else []
        words += [f"computing in {self.compute_precision}"] if self.provider == "openvino" else []
        words += ["channels last"] if self.channels_last else []
        words += ["CUDA graph"] if self.cuda_graph else []
        words += [] if self.pinned else ["plain copies"]
        return ", ".join(words)

    def satisfies(self, options: RunOptions) -> bool:
        """Return whether the plan has all values that `options` fix."""
        fixed = _fixed(options, self.provider)
        return (
            (self.provider == "remote") == bool(options.remote.urls)
            and options.provider in ("auto", self.provider)
            and options.batch_size in (0, self.batch_size)
            and options.compute_precision in ("auto", self.compute_precision)
            and fixed.streams in (0, self.streams)
            and fixed.cuda_graph in (None, self.cuda_graph)
            and fixed.channels_last in (None, self.channels_last)
        )

    def options(self, device: int = 0, allow_cpu: bool = False) -> EngineOptions:
        """Return the options of the engine on one device."""
        return EngineOptions(
            streams=self.streams,
            compute_precision=self.compute_precision,
            cuda_graph=self.cuda_graph,
            channels_last=self.channels_last,
            pinned=self.pinned,
            device=device,
            allow_cpu=allow_cpu,
            keep_compiled=True,
        )


def make_plan(
    model: onnx.ModelProto,
    artifact: Artifact,
    options: RunOptions,
    settled: Plan | None = None,
    samples: Samples | None = None,
) -> Plan:
    """Choose the provider and the settings to run an artifact with, measuring what the cache does not contain.

    "auto" prefers GPU providers to CPU providers. Of these, it takes ONNX Runtime's CUDA or CPU provider, unless
    another one is at least `MARGIN` times as fast and its output agrees with ONNX Runtime's CPU provider in fp32.
    TensorRT is considered only if its engine is in the cache, because building an engine takes minutes.

    Parameters
    ----------
    model, artifact
        The model and its metadata.
    options
        The user's options.
    settled
        The plan of a resumed run: it is checked and returned, and nothing is measured.
    samples
        Returns images to compare providers on; None uses synthetic scenes.

    Raises
    ------
    ProviderError
        The requested provider cannot run on this machine (the message says what to install), has no int8 kernels for
        the artifact's int8 layers, or does not support one of the options.
    """
    require(options.provider, artifact)
    if settled:
        require(settled.provider, artifact)
    _check_devices(options, settled.provider if settled else options.provider)
    if options.compute_precision != "auto":
        if options.provider != "openvino":
            raise ProviderError(f"`compute_precision={options.compute_precision!r}` needs `provider='openvino'`")
        _check_precision(options.compute_precision)
    if settled:
        return settled
    threads = options.threads or usable_cpus()
    digest = hashlib.sha256(graph_bytes(model)).hexdigest()
    measurements = _Measurements(
        model, artifact, options, MeasurementCache(digest, threads, options.allow_cpu), samples
    )
    if options.provider != "auto":
        return measurements.plan(options.provider, measurements.precision(options.provider), alone=True)
    return _take_the_fastest(measurements, artifact)


def _fixed(options: RunOptions, provider: str) -> FixedSettings:
    """Return the settings of a provider that the options fix."""
    size = options.batch_size or (BATCH_SIZES["tensorrt"] if provider == "tensorrt" else 0)
    if provider == "cpu":
        return FixedSettings(size, 1, False)
    if provider == "remote":
        return FixedSettings(size, options.remote.streams, False)
    if provider == "openvino":
        return FixedSettings(size, options.openvino.streams, False)
    if provider == "cuda":
        chosen = options.cuda
        return FixedSettings(size, 1 if chosen.graph else chosen.streams, chosen.graph, chosen.channels_last)
    other = options.tensorrt if provider == "tensorrt" else options.tensorrt_rtx
    return FixedSettings(size, 1 if other.graph else other.streams, other.graph)


def _check_precision(precision: str) -> None:
    """Raise ProviderError for a precision that the CPU has no instructions for."""
    from cloudrt.engines.openvino import native_precisions

    native = native_precisions()
    if precision not in native:
        raise ProviderError(f"this CPU has no instructions for {precision}, only for {', '.join(native)}")


def _check_devices(options: RunOptions, provider: str) -> None:
    """Raise ProviderError for GPUs that do not exist, or of different models, whose results could differ."""
    if options.devices is None:
        return
    if provider not in ("auto", *GPU_PROVIDERS):
        raise ProviderError(f"`devices` selects GPUs, but provider {provider} does not run on a GPU")
    driver = nvidia_driver()
    gpus = driver.gpus if driver else ()
    missing = [str(device) for device in options.devices if device >= len(gpus)]
    if missing:
        raise ProviderError(f"there is no GPU {', '.join(missing)}: this process may use {len(gpus)} GPUs")
    kinds = sorted({gpus[device] for device in options.devices})
    if len(kinds) > 1:
        raise ProviderError(f"`devices` has GPUs of different models ({'; '.join(kinds)}): start one run per model")


def _take_the_fastest(measurements: _Measurements, artifact: Artifact) -> Plan:
    precisions, passed_over = _find_candidates(measurements, artifact)
    plans: list[Plan] = []
    for provider, precision in precisions.items():
        try:
            plans.append(measurements.plan(provider, precision, alone=len(precisions) == 1))
        except (ArtifactError, ProviderError) as error:
            passed_over[provider] = str(error)
    if not plans:
        who = "no provider here" if measurements.on_any_device else "`devices` asks for GPUs, but no GPU provider here"
        raise ProviderError(f"{who} runs this artifact: {'; '.join(passed_over.values())}")
    best = plans[-1]  # ONNX Runtime's CUDA or CPU provider, if it can run
    for plan in plans[-2::-1]:
        ratio = measurements.ratio(plan, best)
        winner, loser = (plan, best) if ratio >= MARGIN else (best, plan)
        words = f"{loser.images_per_s:.1f} images/s, compared with {winner.images_per_s:.1f}"
        if winner is best and ratio > 1:
            words = f"{ratio:.2f} times as fast as {best.provider}; a ratio below {MARGIN} may be noise"
        passed_over[loser.provider] = words
        best = winner
    level = logging.INFO if measurements.measured else logging.DEBUG  # logged only by the run that measures
    for name, reason in passed_over.items():
        logger.log(level, "  %s was not chosen: %s", name, reason)
    return replace(best, passed_over=passed_over)


def _find_candidates(measurements: _Measurements, artifact: Artifact) -> tuple[dict[str, str], dict[str, str]]:
    """Return provider -> precision of those that can run and agree with the reference, and the others with a reason."""
    precisions: dict[str, str] = {}
    passed_over: dict[str, str] = {}
    for provider in NAMES:
        on_gpu = precisions.keys() & set(GPU_PROVIDERS) or not measurements.on_any_device
        if provider not in GPU_PROVIDERS and on_gpu:
            break
        reason = hindrance(provider, artifact)
        if reason is None and provider == "tensorrt" and not measurements.has_tensorrt_engine():
            reason = "building its engine would take minutes: request provider tensorrt to run it"
        if reason is None:
            try:
                precision = measurements.precision(provider)
                reason = measurements.disagreement(provider, precision)
            except (ArtifactError, ProviderError) as error:
                reason = str(error)
        if reason:
            passed_over[provider] = reason
        else:
            precisions[provider] = precision
    return precisions, passed_over


class _Measurements:
    """The measurements of one artifact, read from the cache if they are there."""

    def __init__(
        self,
        model: onnx.ModelProto,
        artifact: Artifact,
        options: RunOptions,
        known: MeasurementCache,
        samples: Samples | None,
    ) -> None:
        self._model, self._artifact, self._options, self._known = model, artifact, options, known
        self._samples = samples
        self._trial: ProviderTrial | None = None

    @property
    def on_any_device(self) -> bool:
        """Whether CPU providers may be chosen, because `devices` is not given."""
        return self._options.devices is None

    @property
    def measured(self) -> bool:
        """Whether anything was measured, and not only read from the cache."""
        return self._trial is not None

    def precision(self, provider: str) -> str:
        """Return the compute precision: for OpenVINO, the requested one or the first that agrees; otherwise "fp32"."""
        if provider != "openvino":
            return "fp32"
        if self._options.compute_precision != "auto":
            return self._options.compute_precision
        from cloudrt.engines.openvino import native_precisions

        native = native_precisions()
        # For an fp32 artifact, fp32.
        for precision in {"fp16": ("fp16", "bf16"), "int8": ("bf16",)}.get(self._artifact.precision, ()):
            if precision in native and self.disagreement(provider, precision) is None:
                return precision
        return "fp32"

    def has_tensorrt_engine(self) -> bool:
        from cloudrt.engines.session import tensorrt_engine_exists

        size = _fixed(self._options, "tensorrt").batch_size
        content = graph_bytes(self._model)
        return all(tensorrt_engine_exists(self._artifact, size, content, device) for device in self._options.gpus)

    def disagreement(self, provider: str, precision: str) -> str | None:
        """Return `ProviderTrial.disagreement`, from the cache if it is there; None for the reference, the CPU provider.

        Results for the user's images and for synthetic scenes are stored separately. Without images, a stored result of
        either kind is returned.
        """
        if provider == "cpu":
            return None
        keys = [f"agreement of {provider} {precision} on {source}" for source in ("images", "scenes")]
        for key in keys[:1] if self._samples else keys:
            reason = self._known.get(key)
            if key in self._known and (reason is None or isinstance(reason, str)):
                return reason
        reason = self._open_trial().disagreement(provider, precision)
        self._known.put(keys[0] if self._samples else keys[1], reason)
        return reason

    def plan(self, provider: str, precision: str, *, alone: bool) -> Plan:
        """Return the plan with the fastest settings of a provider.

        Nothing is measured for the CPU provider, whose only setting is the batch size, if the options fix it and no
        other provider is compared (`alone`).
        """
        fixed = _fixed(self._options, provider)
        asked = fixed.batch_size
        if asked and provider == "cpu" and alone:
            return Plan(provider, asked)
        key = (
            f"rate of {provider} {precision}, batch {asked or 'free'}, streams {fixed.streams or 'free'}, "
            f"graph {fixed.cuda_graph}, channels last {fixed.channels_last}"
        )
        settings = Setting.read(self._known.get(key))
        refusal = None
        if not settings:
            trial = self._open_trial()
            settings, refusal = trial.measure_settings(provider, precision, fixed), trial.refusal
            if settings:  # not stored if memory ran out: there may be enough next time
                self._known.put(key, [setting.to_dict() for setting in settings])
        best = best_setting(settings)
        if best is None:
            raise refusal or MemoryExhausted(
                f"{provider} does not have enough memory for {asked or 1} images: use a smaller `batch_size`"
            )
        return Plan(
            provider=provider,
            batch_size=best.batch_size,
            streams=best.streams,
            compute_precision=precision,
            cuda_graph=best.cuda_graph,
            channels_last=best.channels_last,
            pinned=best.pinned,
            images_per_s=max(setting.images_per_s for setting in settings),
        )

    def ratio(self, plan: Plan, other: Plan) -> float:
        """Return how many times as fast a plan is as another; they are timed alternately if the rates are close."""
        apart = plan.images_per_s / other.images_per_s if other.images_per_s else math.inf
        if not 1 / CLEAR < apart < CLEAR:
            return apart
        key = f"ratio of {plan.describe()} to {other.describe()}"
        ratio = self._known.get(key)
        if not isinstance(ratio, float) or not 0 < ratio < math.inf:
            try:
                ratio = self._open_trial().compare(_candidate(plan), _candidate(other))
            except (ArtifactError, ProviderError) as error:
                logger.info("  %s and %s cannot be timed alternately: %s", plan.provider, other.provider, error)
                return apart
            self._known.put(key, ratio)
        return ratio

    def _open_trial(self) -> ProviderTrial:
        if self._trial is None:
            logger.info("Measuring the fastest settings, once per model and machine; this takes up to a minute")
            options = self._options
            self._trial = ProviderTrial(
                self._model,
                self._artifact,
                options.threads or usable_cpus(),
                options.gpus[0],
                options.allow_cpu,
                options.batch_size,
                self._samples,
            )
        return self._trial


def _candidate(plan: Plan) -> Candidate:
    setting = Setting(
        plan.batch_size, plan.streams, plan.cuda_graph, channels_last=plan.channels_last, pinned=plan.pinned
    )
    return Candidate(plan.provider, plan.compute_precision, setting)
