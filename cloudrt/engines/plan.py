"""Plan how to run an artifact on this machine: measured once, cached, and recorded with every run.

    providers that can run here -> those that agree with ONNX Runtime CPU fp32 -> the fastest, at its best batch

Measurements are stored in the user's cache folder, with a key from the artifact's graph, the machine and the versions.
New rules, as written by `cloudrt tune`, do not change the key.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cloudrt.engines.availability import NAMES
from cloudrt.engines.base import EngineOptions
from cloudrt.engines.candidates import Candidate, Setting, fixed_settings
from cloudrt.engines.choice import artifact_problem, require
from cloudrt.engines.measurements import MeasurementCache, Measurements
from cloudrt.errors import ArtifactError, ProviderError
from cloudrt.model.artifact import Artifact
from cloudrt.model.onnx_file import graph_bytes
from cloudrt.options import GPU_PROVIDERS, RunOptions
from cloudrt.system.machine import usable_cpus
from cloudrt.system.nvidia import driver_is_loaded, nvidia_driver

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

MARGIN = 1.1
"""A provider replaces the one chosen so far if it is at least this many times as fast; a smaller gain may be noise.

The first choice is ONNX Runtime's CUDA or CPU provider. The others follow in the reverse order of `NAMES` in
`availability.py`.
"""
Samples = Callable[[], NDArray[np.uint8]]
"""Returns images of the user, (N, H, W, 3) uint8, on which the outputs of providers are compared."""


@dataclass(frozen=True)
class Plan:
    """How an artifact is run.

    Parameters
    ----------
    provider
        One of `cloudrt.options.PROVIDERS`, never "auto"; or "remote", for the servers of `RemoteOptions`.
    batch_size
        Number of images per batch.
    streams, compute_precision, cuda_graph, channels_last, pinned
        See `EngineOptions`.
    images_per_s
        Highest measured rate of the network alone; 0 if nothing was measured.
    passed_over
        The providers that were considered but not chosen, with the reason for each.
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
        setting = Setting(
            self.batch_size, self.streams, self.cuda_graph, channels_last=self.channels_last, pinned=self.pinned
        )
        return Candidate(self.provider, self.compute_precision, setting).describe()

    def satisfies(self, options: RunOptions) -> bool:
        """Return whether the plan has all values that `options` fix."""
        fixed = fixed_settings(options, self.provider)
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

    "auto" only takes a provider whose output agrees with ONNX Runtime's CPU provider in fp32. It prefers GPU providers
    to CPU providers. Of the preferred kind, it takes ONNX Runtime's provider (CUDA or CPU), unless another one is at
    least `MARGIN` times as fast. TensorRT is considered only if its engine is in the cache, because building an engine
    takes minutes.

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
    ArtifactError
        The requested provider refuses the graph.
    ProviderError
        The requested provider cannot run on this machine (the message says what to install), has no int8 kernels for
        the artifact's int8 layers, or does not support one of the options; or no provider can run the artifact.
    """
    require(options.provider, artifact)
    if settled:
        require(settled.provider, artifact)
    _check_devices(options, settled.provider if settled else options.provider)
    if options.compute_precision != "auto":
        if options.provider != "openvino":
            raise ProviderError(f"`compute_precision={options.compute_precision!r}` needs `provider='openvino'`")
        from cloudrt.engines.openvino import require_precision

        require_precision(options.compute_precision)
    if settled:
        return settled
    threads = options.threads or usable_cpus()
    digest = hashlib.sha256(graph_bytes(model)).hexdigest()
    known = MeasurementCache(digest, threads, options.allow_cpu, options.gpus[0])
    measurements = Measurements(model, artifact, options, known, samples)
    if options.provider != "auto":
        return _plan(measurements.fastest(options.provider, measurements.precision(options.provider), alone=True), {})
    return _take_the_fastest(measurements, artifact)


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


def _take_the_fastest(measurements: Measurements, artifact: Artifact) -> Plan:
    precisions, passed_over = _find_candidates(measurements, artifact)
    candidates: list[Candidate] = []
    for provider, precision in precisions.items():
        try:
            candidates.append(measurements.fastest(provider, precision, alone=len(precisions) == 1))
        except (ArtifactError, ProviderError) as error:
            passed_over[provider] = str(error)
    if not candidates:
        who = "no provider here" if measurements.on_any_device else "`devices` asks for GPUs, but no GPU provider here"
        raise ProviderError(f"{who} runs this artifact: {'; '.join(passed_over.values())}")
    best = candidates[-1]  # ONNX Runtime's CUDA or CPU provider, if it can run
    for candidate in candidates[-2::-1]:
        ratio = measurements.ratio(candidate, best)
        winner, loser = (candidate, best) if ratio >= MARGIN else (best, candidate)
        words = f"{loser.setting.images_per_s:.1f} images/s, compared with {winner.setting.images_per_s:.1f}"
        if winner is best and ratio > 1:
            words = f"{ratio:.2f} times as fast as {best.provider}; a ratio below {MARGIN} may be noise"
        passed_over[loser.provider] = words
        best = winner
    unused = _reason_without_gpu(best.provider, passed_over)
    if unused:
        logger.warning("No GPU is used: %s", unused)
    level = logging.INFO if measurements.measured else logging.DEBUG  # logged only by a run that measures
    for name, reason in passed_over.items():
        if reason != unused:
            logger.log(level, "  %s was not chosen: %s", name, reason)
    return _plan(best, passed_over)


def _reason_without_gpu(chosen: str, passed_over: dict[str, str]) -> str | None:
    """Return why CUDA was not chosen, if a CPU provider was, although there may be a GPU that the user did not hide."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if chosen in GPU_PROVIDERS or hidden or not driver_is_loaded():
        return None
    return passed_over.get("cuda")


def _find_candidates(measurements: Measurements, artifact: Artifact) -> tuple[dict[str, str], dict[str, str]]:
    """Return provider -> precision of those that can run and agree with the reference, and the others with a reason.

    CPU providers are skipped if `devices` is given or a GPU provider is among the candidates.
    """
    precisions: dict[str, str] = {}
    passed_over: dict[str, str] = {}
    for provider in NAMES:
        on_gpu = precisions.keys() & set(GPU_PROVIDERS) or not measurements.on_any_device
        if provider not in GPU_PROVIDERS and on_gpu:
            break
        reason = artifact_problem(provider, artifact)
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


def _plan(one: Candidate, passed_over: dict[str, str]) -> Plan:
    setting = one.setting.to_dict()
    return Plan(provider=one.provider, compute_precision=one.precision, passed_over=passed_over, **setting)
