"""The measurements behind a plan: whether a provider agrees with the reference, and its fastest setting."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cloudrt.engines.base import BATCH_SIZES, Engine, EngineOptions
from cloudrt.engines.choice import open_engine
from cloudrt.errors import ArtifactError, CloudrtError, MemoryExhausted, ProviderError
from cloudrt.labels import Grid
from cloudrt.model.artifact import Artifact
from cloudrt.model.parity import TOLERANCES, Answers, Tally, half_of_the_levels
from cloudrt.options import GPU_PROVIDERS

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

COMPARED = 64
"""How many images a provider must agree on: enough rows to measure a share of 0.5%."""
SCENES = 16
"""How many different scenes `make_samples` draws."""
BUDGET = 12.0
"""Seconds that climbing may take for each provider, loading apart; a rung that would take longer is left out."""
SHORTEST = 0.2
"""Seconds that a rung is timed at least."""
GAIN = 1.05
"""What a larger batch must give to be worth its memory."""
ROUNDS = 5
"""How often two settings are timed in turns."""
BATCHES = {
    "cpu": (1, 2, 4, 8),
    "openvino": (1, 2, 4, 8),
    "cuda": (8, 16, 32, 64, 128),
    # An engine is built for each batch size.
    "tensorrt": (BATCH_SIZES["tensorrt"],),
    "tensorrt-rtx": (BATCH_SIZES["tensorrt-rtx"],),
}


@dataclass(frozen=True)
class Rung:
    """One way to run an engine, and the images/s that it gave."""

    batch_size: int
    streams: int = 1
    cuda_graph: bool = False
    images_per_s: float = 0.0
    channels_last: bool = False
    pinned: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def read(cls, values: Any) -> list[Rung]:
        """Return rungs from what `to_dict` gave of each; none where that is no such list."""
        try:
            rungs = [cls(**one) for one in values]
        except TypeError:
            return []
        kinds = (int, int, bool, float, bool, bool)
        for rung in rungs:
            found = tuple(map(type, asdict(rung).values()))
            if found != kinds or min(rung.batch_size, rung.streams) < 1 or not 0 < rung.images_per_s < math.inf:
                return []
        return rungs


@dataclass(frozen=True)
class Ladder:
    """The settings that the user fixes; 0 and None are measured."""

    batch_size: int = 0
    streams: int = 0
    cuda_graph: bool | None = None
    channels_last: bool | None = None


ANY = Ladder()


@dataclass(frozen=True)
class Entrant:
    """A provider at one setting."""

    provider: str
    precision: str
    rung: Rung


@dataclass
class ProviderTrial:
    """Measures one artifact in several providers.

    Parameters
    ----------
    model, artifact
        The model and its description.
    threads
        CPU threads of an engine.
    device
        The GPU to measure; the others are of the same model.
    allow_cpu
        See `EngineOptions`.
    batch_size
        The one to run, for which TensorRT's engine exists; 0 takes the provider's default.
    samples
        Gives (N, H, W, 3) uint8 images to compare on; fewer than `COMPARED` are filled up with made-up scenes.
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
        self._answers: Answers | None = None

    @property
    def images(self) -> NDArray[np.uint8]:
        """(`COMPARED`, H, W, 3) uint8."""
        if self._images is None:
            size = self.artifact.input_size
            given = self.samples()[:COMPARED] if self.samples else np.empty((0, *size, 3), np.uint8)
            scenes = [make_samples(COMPARED - len(given), size, self.threads)] if len(given) < COMPARED else []
            self._images = np.concatenate([given, *scenes])
        return self._images

    def open(self, provider: str, precision: str, rung: Rung) -> Engine:
        """Open an engine with the settings of a rung."""
        options = EngineOptions(
            streams=rung.streams,
            compute_precision=precision,
            cuda_graph=rung.cuda_graph,
            channels_last=rung.channels_last,
            pinned=rung.pinned,
            device=self.device,
            allow_cpu=self.allow_cpu,
        )
        return open_engine(self.model, provider, rung.batch_size, self.threads, options)

    def disagreement(self, provider: str, precision: str) -> str | None:
        """Return what is past the gate's tolerances between a provider and ONNX Runtime CPU fp32; None where it agrees.

        `COMPARED` images are compared, level by level and by the submissions that the artifact's rules give, until the
        result is certain. An artifact's int8 layers round in the reference too, in float.
        """
        answers = self._reference()
        widest = max((TOLERANCES[precision], TOLERANCES[self.artifact.precision]), key=lambda one: one.mean_difference)
        tally, faults = Tally(answers), []
        size = BATCH_SIZES[provider]
        if provider in ("tensorrt", "tensorrt-rtx"):
            size = self.batch_size or size
        try:
            with self.open(provider, precision, Rung(size)) as engine:
                for position, levels, presence in _run_all(engine, self.images):
                    tally.add(position, levels, presence)
                    faults = tally.at_best(provider).faults(widest)
                    if faults:
                        break
        except MemoryExhausted:
            raise  # says nothing about the answers
        except (ArtifactError, ProviderError) as error:
            return str(error)
        return f"its answers differ from ONNX Runtime's CPU provider in fp32: {'; '.join(faults)}" if faults else None

    def climb(self, provider: str, precision: str, given: Ladder = ANY) -> list[Rung]:
        """Return the rungs that were tried, with their rates; none where the provider runs no batch at all.

        Streams first, at the smallest batch, then batches, then channels-last convolutions, copies by ONNX Runtime
        itself and a CUDA graph, each at the best so far. Each ladder ends where two rungs in a row gain nothing, where
        a rung is refused, or at the end of `BUDGET`. `refusal` is then why the last rung was refused, else None.
        """
        self.refusal = None
        rungs: list[Rung] = []
        deadline = time.perf_counter() + BUDGET
        for ladder in self._ladders(provider, given):
            useless = 0
            for rung in ladder(best_rung(rungs)):
                tried = self._try(provider, precision, rung, best_rung(rungs), deadline)
                if tried is None:
                    break
                best = best_rung(rungs)
                useless = 0 if best is None or tried.images_per_s > GAIN * best.images_per_s else useless + 1
                rungs.append(tried)
                if useless == 2:
                    break
        return rungs

    def compare(self, one: Entrant, other: Entrant) -> float:
        """Return how many times as fast `one` is as `other`: the median of `ROUNDS` ratios, timed in turns.

        Raises
        ------
        ArtifactError, ProviderError
            One of them cannot be opened beside the other, or fails.
        """
        with ExitStack() as stack:
            engines = [stack.enter_context(self.open(it.provider, it.precision, it.rung)) for it in (one, other)]
            batches = [self._batch(it.rung) for it in (one, other)]
            ratios = []
            for _ in range(ROUNDS):
                ours, theirs = (measure_rate(engine, batch) for engine, batch in zip(engines, batches, strict=True))
                ratios.append(ours / theirs)
        return float(np.median(ratios))

    def _ladders(self, provider: str, given: Ladder) -> Iterator[Callable[[Rung | None], Iterator[Rung]]]:
        graph, layout = bool(given.cuda_graph), bool(given.channels_last)

        def streams(_best: Rung | None) -> Iterator[Rung]:
            smallest = given.batch_size or BATCHES[provider][0]
            if given.streams:
                yield Rung(smallest, given.streams, graph, channels_last=layout)
                return
            most = {"openvino": self.threads, "cpu": 1, "tensorrt-rtx": 1}.get(provider, 2)
            for power in range(math.floor(math.log2(most)) + 1):
                yield Rung(smallest, 2**power, channels_last=layout)

        def batches(best: Rung | None) -> Iterator[Rung]:
            if best and not given.batch_size:
                for size in BATCHES[provider][1:]:
                    yield replace(best, batch_size=size)

        def layouts(best: Rung | None) -> Iterator[Rung]:
            if best and provider == "cuda" and given.channels_last is None:
                yield replace(best, channels_last=True)

        def copies(best: Rung | None) -> Iterator[Rung]:
            if best and provider in ("cuda", "tensorrt") and not best.cuda_graph:
                yield replace(best, pinned=False)

        def graphs(best: Rung | None) -> Iterator[Rung]:
            if best and provider in GPU_PROVIDERS and given.cuda_graph is None and given.streams in (0, 1):
                yield replace(best, streams=1, cuda_graph=True, pinned=True)

        yield from (streams, batches, layouts, copies, graphs)

    def _try(self, provider: str, precision: str, rung: Rung, best: Rung | None, deadline: float) -> Rung | None:
        """Return the rung with its rate; None where there is no time for it, or the provider refuses it."""
        work = rung.batch_size * rung.streams
        if best and time.perf_counter() + 3 * work / best.images_per_s > deadline:
            return None
        words = f"{provider} {precision}: batch {rung.batch_size}, streams {rung.streams}"
        words += ", channels last" if rung.channels_last else ""
        words += ", CUDA graph" if rung.cuda_graph else ""
        words += "" if rung.pinned else ", plain copies"
        try:
            with self.open(provider, precision, rung) as engine:
                rate = measure_rate(engine, self._batch(rung))
        except (ArtifactError, ProviderError) as error:
            self.refusal = error
        except MemoryError as error:
            self.refusal = MemoryExhausted(f"{provider} has no memory for a batch of {rung.batch_size}: {error}")
        else:
            logger.info("  %s: %.1f images/s", words, rate)
            return replace(rung, images_per_s=max(0.01, round(float(rate), 2)))
        logger.info("  %s: %s", words, self.refusal)
        return None

    def _batch(self, rung: Rung) -> NDArray[np.uint8]:
        if self._images is None:  # what an image shows does not change the rate
            pattern = np.random.default_rng(0).integers(0, 256, (4, *self.artifact.input_size, 3), np.uint8)
        else:
            pattern = self._images
        return pattern[np.arange(rung.batch_size) % len(pattern)]

    def _reference(self) -> Answers:
        if self._answers is None:
            options = EngineOptions(emulate=self.artifact.precision == "int8")
            with open_engine(self.model, "cpu", BATCH_SIZES["cpu"], self.threads, options) as engine:
                answers = list(_run_all(engine, self.images))
            presence = [head for _, _, head in answers if head is not None]
            rules = self.artifact.rules or half_of_the_levels(len(self.artifact.labels.classes))
            self._answers = Answers(
                [f"image {position}" for position, _, _ in answers],
                np.stack([levels for _, levels, _ in answers]),
                rules,
                bool(self.artifact.rules),
                self.artifact.labels.submit_grid,
                "images",
                np.stack(presence) if presence else None,
            )
        return self._answers


def make_samples(count: int, size: Grid, threads: int = 1) -> NDArray[np.uint8]:
    """Return made-up images (N, H, W, 3): up to `SCENES` scenes, then the same shifted, mirrored and paler."""
    from cloudrt.data.scenes import draw_image

    with ThreadPoolExecutor(max(1, threads)) as pool:
        scenes = list(pool.map(lambda seed: draw_image(seed, size), range(min(count, SCENES))))
    images = []
    for number in range(count):
        turn = number // SCENES
        image = np.roll(scenes[number % SCENES], (turn * size[0] // 3, turn * size[1] // 5), (0, 1))
        image = image[:, ::-1] if turn % 2 else image
        # Dark pixels stay as they are: black ones are pixels without data.
        images.append(image - (image * (0.12 * turn)).astype(np.uint8))
    return np.stack(images)


def _run_all(
    engine: Engine, images: NDArray[np.uint8]
) -> Iterator[tuple[int, NDArray[np.uint8], NDArray[np.uint8] | None]]:
    """Yield position, (C, W, H) levels and (C,) presence of each image; the last batch is filled up."""
    size = engine.batch_size or len(images)
    for begin in range(0, len(images), size):
        probability, presence = engine.run(images[np.arange(begin, begin + size) % len(images)])
        for row in range(min(size, len(images) - begin)):
            yield begin + row, np.ascontiguousarray(probability[row]), None if presence is None else presence[row]


def measure_rate(engine: Engine, batch: NDArray[np.uint8]) -> float:
    """Return images/s of an engine with all of its streams at work, the best of two rounds after a warm-up."""
    images = engine.empty(1)  # where the pipeline decodes to
    images[...] = batch
    with ThreadPoolExecutor(engine.streams) as pool:

        def run(times: int) -> float:
            began = time.perf_counter()
            for done in [pool.submit(engine.run, images) for _ in range(times * engine.streams)]:
                done.result()
            return time.perf_counter() - began

        once = run(1)
        times = max(1, math.ceil(SHORTEST / 2 / max(once, 1e-6)))
        best = min(run(times) for _ in range(2))
    return times * engine.streams * len(batch) / best


def best_rung(rungs: list[Rung]) -> Rung | None:
    """Return the fastest rung, the first of those that are as good; None where there are none."""
    if not rungs:
        return None
    fastest = max(rung.images_per_s for rung in rungs)
    return next(rung for rung in rungs if GAIN * rung.images_per_s >= fastest)
