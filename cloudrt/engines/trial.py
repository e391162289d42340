"""The measurements for a plan: whether a provider agrees with the reference, and its fastest settings."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cloudrt.engines.base import BATCH_SIZES, Engine, EngineOptions
from cloudrt.engines.candidates import GAIN, NOTHING_FIXED, Candidate, FixedSettings, Setting, best_setting
from cloudrt.engines.choice import open_engine
from cloudrt.errors import ArtifactError, CloudrtError, MemoryExhausted, ProviderError
from cloudrt.model.artifact import Artifact
from cloudrt.model.parity import TOLERANCES, ParityAccumulator, ReferenceOutputs, default_rules
from cloudrt.options import GPU_PROVIDERS, TENSORRT_PROVIDERS

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

COMPARED = 64
"""Number of images on which a provider is compared with the reference: 256 rows for four classes, enough to measure
a fraction of 0.5%."""
BUDGET_S = 12.0
"""Time limit of `measure_settings` in seconds; a setting that is expected to exceed it is not measured. The estimate
does not include opening an engine."""
SHORTEST_S = 0.2
"""Shortest time to measure a setting, in seconds."""
ROUNDS = 5
"""Number of rounds in which two settings are timed alternately."""
BATCHES = {
    "cpu": (1, 2, 4, 8),
    "openvino": (1, 2, 4, 8),
    "cuda": (8, 16, 32, 64, 128),
    # An engine is built for each batch size.
    "tensorrt": (BATCH_SIZES["tensorrt"],),
    "tensorrt-rtx": (BATCH_SIZES["tensorrt-rtx"],),
}


@dataclass
class ProviderTrial:
    """Measures one artifact with several providers.

    Parameters
    ----------
    model, artifact
        The model and its metadata.
    threads
        Number of CPU threads of an engine.
    device
        Number of the GPU to measure; the other GPUs are of the same model.
    allow_cpu
        See `EngineOptions`.
    batch_size
        The batch size that TensorRT is compared at, as it builds an engine for each; 0 uses the provider's default.
    samples
        Returns images to compare on, (N, H, W, 3) uint8. Synthetic scenes are added up to `COMPARED` images.
    """

    model: onnx.ModelProto
    artifact: Artifact
    threads: int
    device: int = 0
    allow_cpu: bool = False
    batch_size: int = 0
    samples: Callable[[], NDArray[np.uint8]] | None = None

    def __post_init__(self) -> None:
        self.refusal: CloudrtError | None = None
        self._images: NDArray[np.uint8] | None = None
        self._outputs: ReferenceOutputs | None = None

    @property
    def images(self) -> NDArray[np.uint8]:
        """The images to compare on, (`COMPARED`, H, W, 3) uint8, generated or loaded on first use."""
        if self._images is None:
            from cloudrt.data.scenes import make_samples

            size = self.artifact.input_size
            given = self.samples()[:COMPARED] if self.samples else np.empty((0, *size, 3), np.uint8)
            scenes = [make_samples(COMPARED - len(given), size, self.threads)] if len(given) < COMPARED else []
            self._images = np.concatenate([given, *scenes])
        return self._images

    def open(self, provider: str, precision: str, setting: Setting) -> Engine:
        """Open an engine with the given settings."""
        options = EngineOptions(
            streams=setting.streams,
            compute_precision=precision,
            cuda_graph=setting.cuda_graph,
            channels_last=setting.channels_last,
            pinned=setting.pinned,
            device=self.device,
            allow_cpu=self.allow_cpu,
        )
        return open_engine(self.model, provider, setting.batch_size, self.threads, options)

    def disagreement(self, provider: str, precision: str) -> str | None:
        """Return how the output of a provider differs from ONNX Runtime's CPU provider in fp32; None if it agrees.

        The outputs agree if they are within `TOLERANCES`. They are compared on `COMPARED` images, by levels and by the
        submissions that the artifact's rules give; the comparison stops as soon as a limit is certainly exceeded. For
        an int8 artifact, the reference computes in float between quantisation and dequantisation.

        Raises
        ------
        ArtifactError, ProviderError
            The provider refuses the graph or fails, or the reference cannot run.
        """
        widest = max((TOLERANCES[precision], TOLERANCES[self.artifact.precision]), key=lambda one: one.mean_difference)
        faults: list[str] = []
        size = BATCH_SIZES[provider]
        if provider in TENSORRT_PROVIDERS:
            size = self.batch_size or size
        with self.open(provider, precision, Setting(size)) as engine:
            tally = ParityAccumulator(self._reference())
            for position, levels, presence in _run_all(engine, self.images):
                tally.add(position, levels, presence)
                faults = tally.lower_bound(provider).faults(widest)
                if faults:
                    break
        return f"its output differs from ONNX Runtime's CPU provider in fp32: {'; '.join(faults)}" if faults else None

    def measure_settings(self, provider: str, precision: str, given: FixedSettings = NOTHING_FIXED) -> list[Setting]:
        """Return the settings that were measured, with their rates; an empty list if the provider cannot run any.

        The steps are: numbers of streams with the smallest batch, batch sizes, channels-last convolutions, copies by
        ONNX Runtime itself, and a CUDA graph. Each step starts from the best settings so far, and ends when two
        settings in a row are not faster, when the provider refuses one, or when `BUDGET_S` is used up. Afterwards,
        `refusal` is the error of the last refused settings, or None.
        """
        self.refusal = None
        settings: list[Setting] = []
        deadline = time.perf_counter() + BUDGET_S
        for step in self._steps(provider, given):
            useless = 0
            for setting in step(best_setting(settings)):
                tried = self._try(provider, precision, setting, best_setting(settings), deadline)
                if tried is None:
                    break
                best = best_setting(settings)
                useless = 0 if best is None or tried.images_per_s > GAIN * best.images_per_s else useless + 1
                settings.append(tried)
                if useless == 2:
                    break
        return settings

    def compare(self, one: Candidate, other: Candidate) -> float:
        """Return how many times as fast `one` is as `other`: the median of `ROUNDS` ratios, timed alternately.

        Raises
        ------
        ArtifactError, ProviderError
            The two engines cannot be open at the same time, or one fails.
        """
        with ExitStack() as stack:
            engines = [stack.enter_context(self.open(it.provider, it.precision, it.setting)) for it in (one, other)]
            batches = [self._batch(it.setting) for it in (one, other)]
            ratios = []
            for _ in range(ROUNDS):
                ours, theirs = (measure_rate(engine, batch) for engine, batch in zip(engines, batches, strict=True))
                ratios.append(ours / theirs)
        return float(np.median(ratios))

    def _steps(self, provider: str, given: FixedSettings) -> Iterator[Callable[[Setting | None], Iterator[Setting]]]:
        """Yield the steps of `measure_settings`: functions from the best settings so far to the settings to measure."""
        graph, layout = bool(given.cuda_graph), bool(given.channels_last)

        def streams(_best: Setting | None) -> Iterator[Setting]:
            smallest = given.batch_size or BATCHES[provider][0]
            if given.streams:
                yield Setting(smallest, given.streams, graph, channels_last=layout)
                return
            most = {"openvino": self.threads, "cpu": 1, "tensorrt-rtx": 1}.get(provider, 2)
            for power in range(math.floor(math.log2(most)) + 1):
                yield Setting(smallest, 2**power, channels_last=layout)

        def batches(best: Setting | None) -> Iterator[Setting]:
            if best and not given.batch_size:
                for size in BATCHES[provider][1:]:
                    yield replace(best, batch_size=size)

        def layouts(best: Setting | None) -> Iterator[Setting]:
            if best and provider == "cuda" and given.channels_last is None:
                yield replace(best, channels_last=True)

        def copies(best: Setting | None) -> Iterator[Setting]:
            if best and provider in ("cuda", "tensorrt") and not best.cuda_graph:
                yield replace(best, pinned=False)

        def graphs(best: Setting | None) -> Iterator[Setting]:
            if best and provider in GPU_PROVIDERS and given.cuda_graph is None and given.streams in (0, 1):
                yield replace(best, streams=1, cuda_graph=True, pinned=True)

        yield from (streams, batches, layouts, copies, graphs)

    def _try(
        self, provider: str, precision: str, setting: Setting, best: Setting | None, deadline: float
    ) -> Setting | None:
        """Return the settings with their rate, or None if there is no time left or the provider refuses them."""
        work = setting.batch_size * setting.streams
        if best and time.perf_counter() + 3 * work / best.images_per_s > deadline:
            return None
        words = Candidate(provider, precision, setting).describe()
        try:
            with self.open(provider, precision, setting) as engine:
                rate = measure_rate(engine, self._batch(setting))
        except (ArtifactError, ProviderError) as error:
            self.refusal = error
        except MemoryError as error:
            self.refusal = MemoryExhausted(
                f"{provider} does not have enough memory for {setting.batch_size} images: {error}"
            )
        else:
            logger.info("  %s: %.1f images/s", words, rate)
            return replace(setting, images_per_s=max(0.01, round(float(rate), 2)))
        # If the first settings are refused, the provider is not used, and the caller reports the error.
        logger.log(logging.INFO if best else logging.DEBUG, "  %s: %s", words, self.refusal)
        return None

    def _batch(self, setting: Setting) -> NDArray[np.uint8]:
        if self._images is None:  # the content of an image does not change the rate
            pattern = np.random.default_rng(0).integers(0, 256, (4, *self.artifact.input_size, 3), np.uint8)
        else:
            pattern = self._images
        return pattern[np.arange(setting.batch_size) % len(pattern)]

    def _reference(self) -> ReferenceOutputs:
        if self._outputs is None:
            options = EngineOptions(emulate=self.artifact.precision == "int8")
            try:
                with open_engine(self.model, "cpu", BATCH_SIZES["cpu"], self.threads, options) as engine:
                    answers = list(_run_all(engine, self.images))
            except ArtifactError as error:  # says nothing about the provider that is compared
                raise ProviderError(f"the reference cannot run: {error}") from error
            presence = [head for _, _, head in answers if head is not None]
            rules = self.artifact.rules or default_rules(len(self.artifact.labels.classes))
            self._outputs = ReferenceOutputs(
                names=[f"image {position}" for position, _, _ in answers],
                levels=np.stack([levels for _, levels, _ in answers]),
                rules=rules,
                has_rules=bool(self.artifact.rules),
                grid=self.artifact.labels.submit_grid,
                source="images",
                presence=np.stack(presence) if presence else None,
            )
        return self._outputs


def _run_all(
    engine: Engine, images: NDArray[np.uint8]
) -> Iterator[tuple[int, NDArray[np.uint8], NDArray[np.uint8] | None]]:
    """Yield the position, (C, W, H) levels and (C,) presence of each image; the last batch is padded."""
    size = engine.batch_size or len(images)
    for begin in range(0, len(images), size):
        probability, presence = engine.run(images[np.arange(begin, begin + size) % len(images)])
        for row in range(min(size, len(images) - begin)):
            yield begin + row, np.ascontiguousarray(probability[row]), None if presence is None else presence[row]


def measure_rate(engine: Engine, batch: NDArray[np.uint8]) -> float:
    """Return the images/s of an engine with all streams busy: the higher rate of two rounds, after a warm-up."""
    images = engine.empty(1)  # the same memory as in the pipeline
    images[...] = batch
    with ThreadPoolExecutor(engine.streams) as pool:

        def work(_: int) -> None:
            engine.run(images)  # the outputs are discarded, so that their memory is reused, as in the pipeline

        def run(times: int) -> float:
            began = time.perf_counter()
            list(pool.map(work, range(times * engine.streams)))
            return time.perf_counter() - began

        once = run(1)
        times = max(1, math.ceil(SHORTEST_S / 2 / max(once, 1e-6)))
        best = min(run(times) for _ in range(2))
    return times * engine.streams * len(batch) / best
