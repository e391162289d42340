"""The measurements of an artifact on this machine, and their cache in the user's cache folder.

The name of a file is a digest of everything that the measurements depend on: the artifact's graph, the processor, the
GPUs, which of them is measured, the driver's CUDA version, the number of threads, `allow_cpu` and the versions of the
runtimes. If one of them changes, everything is measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cloudrt.engines import tensorrt_rtx
from cloudrt.engines.candidates import Candidate, Setting, best_setting, fixed_settings
from cloudrt.engines.trial import ProviderTrial
from cloudrt.errors import ArtifactError, CloudrtError, ProviderError
from cloudrt.model.artifact import Artifact
from cloudrt.model.onnx_file import graph_bytes
from cloudrt.options import RunOptions
from cloudrt.system.cache import cache_folder, prune
from cloudrt.system.files import replacing
from cloudrt.system.machine import usable_cpus
from cloudrt.system.nvidia import nvidia_driver
from cloudrt.system.versions import package_version

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

CLEAR = 1.5
"""If two rates, measured one after the other, differ by less than this factor, they are timed alternately."""

FORMAT = 3
VERSIONED = (
    *("cloudrt", "onnxruntime-gpu", "onnxruntime", "openvino", "tensorrt-cu13", "tensorrt-cu12", "tensorrt"),
    *tensorrt_rtx.PACKAGES,
)


class MeasurementCache:
    """The measurements of one artifact on this machine: key -> value.

    If the cache cannot be read, it is empty; if it cannot be written, values are kept in memory only.

    Parameters
    ----------
    sha256
        SHA-256 of the artifact's graph.
    threads, allow_cpu
        See `cloudrt.options.RunOptions`.
    device
        Number of the GPU that is measured.
    """

    def __init__(self, sha256: str, threads: int, allow_cpu: bool, device: int = 0) -> None:
        from cloudrt.system.machine import describe_machine

        machine = describe_machine()
        parts = [str(FORMAT), sha256, machine.cpu, *machine.features, *machine.gpus, str(threads)]
        parts += machine.gpus[device : device + 1]  # GPUs of the same model share measurements
        driver = nvidia_driver()
        parts += [
            str(driver.cuda if driver else None),
            str(allow_cpu),
            *(f"{name} {package_version(name)}" for name in VERSIONED),
        ]
        name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
        self._path: Path = cache_folder("plans") / f"{name}.json"
        self._values: dict[str, Any] = {}
        with suppress(OSError, ValueError, RecursionError):
            values = json.loads(self._path.read_text(encoding="utf-8"))
            self._values = values if isinstance(values, dict) else {}

    def get(self, key: str) -> Any:
        """Return the value of a key, or None."""
        return self._values.get(key)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def put(self, key: str, value: Any) -> None:
        """Store a value in memory and on disk."""
        self._values[key] = value
        try:
            with replacing(self._path, sync=False) as partial:
                partial.write_text(json.dumps(self._values, indent=1), encoding="utf-8")
            prune("plans", keep=self._path)
        except (OSError, CloudrtError) as error:
            logger.warning("cannot store the tuning measurements: %s", error)


class Measurements:
    """The measurements of one artifact, read from the cache if they are there.

    Parameters
    ----------
    model, artifact
        The model and its metadata.
    options
        The user's options.
    known
        The cache.
    samples
        See `ProviderTrial`.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        artifact: Artifact,
        options: RunOptions,
        known: MeasurementCache,
        samples: Callable[[], NDArray[np.uint8]] | None,
    ) -> None:
        self._model, self._artifact, self._options, self._known = model, artifact, options, known
        self._samples = samples
        self._trial: ProviderTrial | None = None
        self.measured = False
        """Whether this run stored a comparison, a rate or a ratio that the cache did not have."""

    @property
    def on_any_device(self) -> bool:
        """Whether CPU providers may be chosen: `devices`, which selects GPUs, is not given."""
        return self._options.devices is None

    def precision(self, provider: str) -> str:
        """Return what OpenVINO computes in; "fp32" for other providers, which ignore it.

        If the options do not fix it, fp16 and then bf16 are tried for an fp16 artifact, bf16 for an int8 artifact, and
        nothing for others. The first one is taken that the CPU has instructions for and whose output agrees with the
        reference; if there is none, fp32.
        """
        if provider != "openvino":
            return "fp32"
        if self._options.compute_precision != "auto":
            return self._options.compute_precision
        from cloudrt.engines.openvino import native_precisions

        native = native_precisions()
        for precision in {"fp16": ("fp16", "bf16"), "int8": ("bf16",)}.get(self._artifact.precision, ()):
            with suppress(ProviderError):
                if precision in native and self.disagreement(provider, precision) is None:
                    return precision
        return "fp32"

    def has_tensorrt_engine(self) -> bool:
        """Return whether TensorRT's engine, which takes minutes to build, is in the cache for every GPU."""
        from cloudrt.engines.session import tensorrt_engine_exists

        size = fixed_settings(self._options, "tensorrt").batch_size
        content = graph_bytes(self._model)
        return all(tensorrt_engine_exists(self._artifact, size, content, device) for device in self._options.gpus)

    def disagreement(self, provider: str, precision: str) -> str | None:
        """Return `ProviderTrial.disagreement` or why the provider refuses the graph, from the cache if it is there.

        The result is None for the reference, the CPU provider. Results for the user's images and for synthetic scenes
        are stored separately. Without images, a stored result of either kind is returned. A ProviderError is not
        stored, as its cause may be repaired before the next run: a driver, or memory that other processes use.

        Raises
        ------
        ProviderError
            The provider fails, or the reference cannot run.
        """
        if provider == "cpu":
            return None
        keys = [f"agreement of {provider} {precision} on {source}" for source in ("images", "scenes")]
        for key in keys[:1] if self._samples else keys:
            reason: str | None = self._known.get(key)
            if key in self._known and (reason is None or isinstance(reason, str)):
                return reason
        logger.info("Comparing %s in %s with ONNX Runtime's CPU provider", provider, precision)
        try:
            reason = self._open_trial().disagreement(provider, precision)
        except ArtifactError as error:
            reason = str(error)
        self._known.put(keys[0] if self._samples else keys[1], reason)
        self.measured = True
        return reason

    def fastest(self, provider: str, precision: str, *, alone: bool) -> Candidate:
        """Return a provider with its `best_setting` and its highest rate, which is 0 if nothing was measured.

        Nothing is measured for the CPU provider, whose only setting is the batch size, if the options fix it and no
        other provider is compared (`alone`).

        Raises
        ------
        ArtifactError, ProviderError
            No setting could be measured.
        """
        fixed = fixed_settings(self._options, provider)
        asked = fixed.batch_size
        if asked and provider == "cpu" and alone:
            return Candidate(provider, precision, Setting(asked))
        key = (
            f"rate of {provider} {precision}, batch {asked or 'free'}, streams {fixed.streams or 'free'}, "
            f"graph {fixed.cuda_graph}, channels last {fixed.channels_last}"
        )
        settings = Setting.read(self._known.get(key))
        refusal = None
        if not settings:
            logger.info("Measuring the fastest settings of %s; the results are cached", provider)
            trial = self._open_trial()
            settings, refusal = trial.measure_settings(provider, precision, fixed), trial.refusal
            if settings:  # an error is not stored: there may be enough memory next time
                self._known.put(key, [setting.to_dict() for setting in settings])
                self.measured = True
        best = best_setting(settings)
        if best is None:
            raise refusal or ProviderError(f"no setting of {provider} could be measured")
        rate = max(setting.images_per_s for setting in settings)
        return Candidate(provider, precision, replace(best, images_per_s=rate))

    def ratio(self, one: Candidate, other: Candidate) -> float:
        """Return how many times as fast `one` is as `other`; they are timed alternately if the rates are close."""
        rate, other_rate = one.setting.images_per_s, other.setting.images_per_s
        apart = rate / other_rate if other_rate else math.inf
        if not 1 / CLEAR < apart < CLEAR:
            return apart
        key = f"ratio of {one.describe()} to {other.describe()}"
        ratio = self._known.get(key)
        if not isinstance(ratio, float) or not 0 < ratio < math.inf:
            try:
                ratio = self._open_trial().compare(one, other)
            except (ArtifactError, ProviderError) as error:
                logger.info("  %s and %s cannot be timed alternately: %s", one.provider, other.provider, error)
                return apart
            self._known.put(key, ratio)
            self.measured = True
        return ratio

    def _open_trial(self) -> ProviderTrial:
        if self._trial is None:
            options = self._options
            self._trial = ProviderTrial(
                self._model,
                self._artifact,
                threads=options.threads or usable_cpus(),
                device=options.gpus[0],
                allow_cpu=options.allow_cpu,
                batch_size=options.batch_size,
                samples=self._samples,
            )
        return self._trial
