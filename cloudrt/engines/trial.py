"""The measurements behind a plan: whether a provider agrees with the reference, and its fastest setting."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cloudrt.engines.base import Engine, EngineOptions
from cloudrt.engines.choice import open_engine
from cloudrt.errors import ArtifactError, MemoryExhausted, ProviderError
from cloudrt.model.artifact import Artifact
from cloudrt.model.parity import TOLERANCES, Answers, Tally, half_of_the_levels

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

IMAGES = 2
"""How many scenes a provider must agree on."""
BUDGET = 12.0
"""Seconds that climbing may take for each provider, loading apart; a rung that would take longer is left out."""
SHORTEST = 0.2
"""Seconds that a rung is timed at least."""
GAIN = 1.05
"""What a larger batch must give to be worth its memory."""
BATCHES = {"cpu": (1, 2, 4, 8), "openvino": (1, 2, 4, 8), "cuda": (8, 16, 32, 64, 128), "tensorrt": (32,)}


@dataclass(frozen=True)
class Rung:
    """One way to run an engine, and the images/s that it gave."""

    batch_size: int
    streams: int = 1
    cuda_graph: bool = False
    images_per_s: float = 0.0

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
        kinds = (int, int, bool, float)
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


ANY = Ladder()


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
    """

    model: onnx.ModelProto
    artifact: Artifact
    threads: int
    device: int = 0
    allow_cpu: bool = False

    def __post_init__(self) -> None:
        from cloudrt.data.scenes import draw_scene

        size = self.artifact.input_size
        self.images = np.stack([draw_scene(seed, size).image for seed in range(IMAGES)])
        self._answers: Answers | None = None

    def open(self, provider: str, precision: str, rung: Rung) -> Engine:
        """Open an engine with the settings of a rung."""
        options = EngineOptions(
            streams=rung.streams,
            compute_precision=precision,
            cuda_graph=rung.cuda_graph,
            device=self.device,
            allow_cpu=self.allow_cpu,
        )
        return open_engine(self.model, provider, rung.batch_size, self.threads, options)

    def disagreement(self, provider: str, precision: str) -> str | None:
        """Return what is past the gate's tolerances between a provider and ONNX Runtime CPU fp32; None where it agrees.

        Two scenes are compared, level by level and by the submissions that the artifact's rules give. An artifact's
        int8 layers round in the reference too, in float.
        """
        answers = self._reference()
        tally = Tally(answers)
        try:
            with self.open(provider, precision, Rung(IMAGES)) as engine:
                found, presence = engine.run(self.images)
                for position, levels in enumerate(found):
                    tally.add(position, np.ascontiguousarray(levels), None if presence is None else presence[position])
        except MemoryExhausted:
            raise  # says nothing about the answers
        except (ArtifactError, ProviderError) as error:
            return str(error)
        widest = max((TOLERANCES[precision], TOLERANCES[self.artifact.precision]), key=lambda one: one.mean_difference)
        faults = tally.at_best(provider).faults(widest)
        return f"its answers differ from ONNX Runtime's CPU provider in fp32: {'; '.join(faults)}" if faults else None

    def climb(self, provider: str, precision: str, given: Ladder = ANY) -> list[Rung]:
        """Return the rungs that were tried, with their rates; none where the provider runs no batch at all.

        Streams first, at the smallest batch, then batches, then a CUDA graph at the best of them. Each ladder ends
        where two rungs in a row gain nothing, at the end of `BUDGET`, or of memory.
        """
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

    def _ladders(self, provider: str, given: Ladder) -> Iterator[Callable[[Rung | None], Iterator[Rung]]]:
        def streams(_best: Rung | None) -> Iterator[Rung]:
            smallest = given.batch_size or BATCHES[provider][0]
            if given.streams:
                yield Rung(smallest, given.streams, bool(given.cuda_graph))
                return
            most = {"openvino": self.threads, "cpu": 1}.get(provider, 2)
            for power in range(math.floor(math.log2(most)) + 1):
                yield Rung(smallest, 2**power)

        def batches(best: Rung | None) -> Iterator[Rung]:
            if best and not given.batch_size:
                for size in BATCHES[provider][1:]:
                    yield Rung(size, best.streams, best.cuda_graph)

        def graphs(best: Rung | None) -> Iterator[Rung]:
            if best and provider in ("cuda", "tensorrt") and given.cuda_graph is None and given.streams in (0, 1):
                yield Rung(best.batch_size, 1, True)

        yield from (streams, batches, graphs)

    def _try(self, provider: str, precision: str, rung: Rung, best: Rung | None, deadline: float) -> Rung | None:
        """Return the rung with its rate; None where there is no time or no memory for it."""
        work = rung.batch_size * rung.streams
        if best and time.perf_counter() + 3 * work / best.images_per_s > deadline:
            return None
        with suppress(MemoryExhausted, MemoryError), self.open(provider, precision, rung) as engine:
            rate = measure_rate(engine, self.images[np.arange(rung.batch_size) % IMAGES])
            logger.info(
                "  %s %s: batch %d, streams %d%s: %.1f images/s",
                provider,
                precision,
                rung.batch_size,
                rung.streams,
                ", CUDA graph" if rung.cuda_graph else "",
                rate,
            )
            return Rung(rung.batch_size, rung.streams, rung.cuda_graph, max(0.01, round(float(rate), 2)))
        return None

    def _reference(self) -> Answers:
        if self._answers is None:
            options = EngineOptions(emulate=self.artifact.precision == "int8")
            with open_engine(self.model, "cpu", IMAGES, self.threads, options) as engine:
                levels, presence = engine.run(self.images)
            rules = self.artifact.rules or half_of_the_levels(len(self.artifact.labels.classes))
            names = [f"scene {number}" for number in range(IMAGES)]
            self._answers = Answers(
                names, levels, rules, bool(self.artifact.rules), self.artifact.labels.submit_grid, "scenes", presence
            )
        return self._answers


def measure_rate(engine: Engine, batch: NDArray[np.uint8]) -> float:
    """Return images/s of an engine with all of its streams at work, the best of two rounds after a warm-up."""
    with ThreadPoolExecutor(engine.streams) as pool:

        def run(times: int) -> float:
            began = time.perf_counter()
            for done in [pool.submit(engine.run, batch) for _ in range(times * engine.streams)]:
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
