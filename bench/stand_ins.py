"""Stand-ins for decoding, the engine and post-processing, to measure the overhead of the pipeline itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import cycle
from threading import Lock
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cloudrt.engines.pool import EnginePool
from cloudrt.images.decoding import Decoding
from cloudrt.images.image import Image
from cloudrt.inference.pipeline import Segmenter
from cloudrt.inference.postprocessing import ApplyRules
from cloudrt.masks.postprocess import Maps
from cloudrt.model.artifact import Artifact


class StandIn(Segmenter):
    """The pipeline of a model around stand-ins for decoding, the engine and post-processing."""

    def __init__(self, model: Segmenter) -> None:
        super().__init__(model.model, provider="cpu", batch_size=1, threads=model.threads)
        self.pool.close()
        self.decoding = Undecoded(self.artifact.input_size, self.options.max_pixels, self.stats["decode"])
        self._texts: ApplyRules | None = None

    def use(self, engine: Instant, texts: ApplyRules | None) -> None:
        """Replace the engine and the post-processing; None restores the real post-processing."""
        self.pool.close()
        self.pool = EnginePool(lambda _, __: engine, (0,), engine.batch_size or 1)
        self._texts = texts

    def texts(self, batches: Sequence[Maps]) -> list[str]:
        """Return RLE texts; see `use`."""
        return self._texts(batches) if self._texts else super().texts(batches)


class Undecoded(Decoding):
    """Decoding that takes no time and leaves images as they are."""

    def load(self, source: object, out: Image) -> str | None:
        """Do nothing."""
        return None


class Instant:
    """An engine that returns maps without delay, those of each batch in turn; see `cloudrt.engines.base.Engine`.

    Parameters
    ----------
    artifact
        The metadata of the model.
    batch_size
        Images per batch.
    levels, presence
        (n, C, W, H) and (n, C) uint8, divided into whole batches; a remainder is left out. None for empty maps and no
        presence.
    """

    provider, streams = "cpu", 1

    def __init__(
        self,
        artifact: Artifact,
        batch_size: int,
        levels: NDArray[np.uint8] | None = None,
        presence: NDArray[np.uint8] | None = None,
    ) -> None:
        self.artifact = artifact
        self.batch_size: int | None = batch_size
        self._size = batch_size
        if levels is None:
            levels = np.broadcast_to(np.uint8(0), (batch_size, *artifact.output_shape))  # without memory
        self._batches = cycle(parts(levels, presence, batch_size))

    def run(self, batch: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Return the maps of the next batch."""
        return next(self._batches)

    def probability(self, batch: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the levels alone."""
        return self.run(batch)[0]

    def empty(self, batches: int) -> NDArray[np.uint8]:
        """Return an uninitialised array."""
        return np.empty((batches * self._size, *self.artifact.input_size, 3), np.uint8)

    def close(self) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...


class Staged(Instant):
    """An engine that sleeps `stage_s` seconds in place of copying a batch, then as long in place of computing it.

    It has two streams: one batch is copied while another is computed.
    """

    streams = 2

    def __init__(self, artifact: Artifact, batch_size: int, stage_s: float) -> None:
        super().__init__(artifact, batch_size)
        self._stage_s = stage_s
        self._copies, self._cores = Lock(), Lock()

    def run(self, batch: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Return the maps after both stages; sleeping releases the GIL, as the calls of CUDA do."""
        for resource in (self._copies, self._cores):
            with resource:
                time.sleep(self._stage_s)
        return super().run(batch)


def parts(
    levels: NDArray[np.uint8], presence: NDArray[np.uint8] | None, size: int
) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8] | None]]:
    """Divide maps into parts of `size` images; the last ones that do not fill a part are left out."""
    ranges = [slice(begin, begin + size) for begin in range(0, len(levels) - size + 1, size)]
    return [(levels[some], None if presence is None else presence[some]) for some in ranges]
