"""The engines of one run: one a device, behind one `run` that any of its threads may call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from threading import Condition, Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloudrt.engines.base import Engine
from cloudrt.errors import ArtifactError, CloudrtError, MemoryExhausted, ProviderError
from cloudrt.model.artifact import Artifact
from cloudrt.system.cuda import Batch, DeviceArray

logger = logging.getLogger(__name__)


class EnginePool:
    """Engines of one batch size, which halves when memory runs out.

    Parameters
    ----------
    open_one
        `open_one(device, batch_size)` gives an engine.
    devices
        Numbers of the GPUs; (0,) on a CPU.
    batch_size
        The fixed N to begin with.

    Raises
    ------
    CloudrtError
        What `open_one` raises; engines that were opened before it are closed.
    """

    def __init__(self, open_one: Callable[[int, int], Engine], devices: Sequence[int], batch_size: int) -> None:
        self._open_one, self._devices = open_one, tuple(devices)
        self.batch_size = batch_size
        self.engines: list[Engine] = []
        self.slots = 0  # how many threads may run a batch at once
        self.artifact: Artifact  # what the engines run
        self._free: list[Engine] = []  # an engine is in it as often as it has streams that are not at work
        self._turn = Condition()  # guards what is free, claimed and gone
        self._lent = 0  # streams that are at work
        self._claimed = False  # by who opens the engines anew: nobody else takes one then
        self._gone: CloudrtError | None = None
        self._change = Lock()  # one step down at a time
        self._open()

    def empty(self, batches: int) -> NDArray[np.uint8]:
        """Return an array for the images of some batches, (n, H, W, 3), not initialised."""
        with self._turn:
            self._turn.wait_for(lambda: self._gone or not self._claimed)
            if self._gone:
                raise self._gone
            return self.engines[0].empty(batches)

    def takes(self, place: tuple[str, int]) -> bool:
        """Whether every engine takes arrays of that device."""
        return all(getattr(engine, "place", None) == place for engine in self.engines)

    def run(self, images: Sequence[NDArray[np.uint8]] | Batch) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Return probability (n, C, W_out, H_out) and presence (n, C), or None, of n images (H, W, 3) uint8 RGB.

        A whole batch in one array, (N, H, W, 3), is run as it lies, and an array on the engines' device too; another
        number of images is copied to a batch that is filled up with black.

        Raises
        ------
        MemoryExhausted
            More images than the batch size, or no memory for them: call `step_down`, and come again with fewer.
        CloudrtError
            The pool is closed, or its engines could not be opened again.
        """
        engine = self._take()
        try:
            size = engine.batch_size or len(images)
            if len(images) > size:
                raise MemoryExhausted(f"{len(images)} images for batches of {size}")
            batch: Any
            if isinstance(images, DeviceArray) or (isinstance(images, np.ndarray) and len(images) == size):
                batch = images
            else:
                batch = np.zeros((size, *images[0].shape), np.uint8)
                batch[: len(images)] = images
            probability, presence = engine.run(batch)
            _check_outputs(probability, presence, engine, size)
        except MemoryError as error:
            raise MemoryExhausted(f"no memory for a batch of {engine.batch_size}: {error}") from error
        finally:
            with self._turn:
                self._free.append(engine)
                self._lent -= 1
                self._turn.notify_all()
        return probability[: len(images)], None if presence is None else presence[: len(images)]

    def step_down(self, failed: int, reason: MemoryExhausted) -> None:
        """Open all engines anew with half the batch, unless that happened since a batch of `failed` images failed.

        Raises
        ------
        MemoryExhausted
            `reason`, where a single image does not fit.
        """
        with self._change:
            if self.batch_size < failed:
                return
            if self.batch_size == 1:
                raise reason
            self.resize(self.batch_size // 2)
            logger.warning("%s; going on with batches of %d", reason, self.batch_size)

    def resize(self, batch_size: int) -> None:
        """Open all engines anew with another batch size, once they are done with what they are at."""
        with self._turn:
            self._turn.wait_for(lambda: self._gone or not self._claimed)
            self._claimed = True
            self._turn.wait_for(lambda: self._gone or not self._lent)
            if self._gone:
                raise self._gone
            self._free.clear()
            self._release()
            self.batch_size = batch_size
            try:
                self._open_smaller()
            except BaseException as error:
                self._gone = (
                    error if isinstance(error, CloudrtError) else ProviderError(f"engines could not be opened: {error}")
                )
                raise
            finally:
                self._claimed = False
                self._turn.notify_all()

    def _open_smaller(self) -> None:
        """Open the engines, with half the batch as long as there is no memory for them."""
        while True:
            try:
                return self._open()
            except MemoryExhausted:
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2

    def close(self) -> None:
        """Release the engines once they are done with what they are at; who comes after that is told so."""
        with self._turn:
            self._gone = self._gone or ProviderError("the engines are closed: open a new Segmenter")
            self._turn.notify_all()
            self._turn.wait_for(lambda: not self._lent)
            self._release()

    def _take(self) -> Engine:
        with self._turn:
            self._turn.wait_for(lambda: self._gone or (self._free and not self._claimed))
            if self._gone:
                raise self._gone
            self._lent += 1
            return self._free.pop(0)

    def _release(self) -> None:
        for engine in self.engines:
            engine.close()

    def _open(self) -> None:
        self.engines = []
        try:
            for device in self._devices:
                self.engines.append(self._open_one(device, self.batch_size))
        except BaseException:
            self._release()
            raise
        self._free = [engine for engine in self.engines for _ in range(engine.streams)]
        self.slots = len(self._free)
        self.artifact = self.engines[0].artifact


def _check_outputs(
    probability: NDArray[np.uint8], presence: NDArray[np.uint8] | None, engine: Engine, images: int
) -> None:
    """Refuse outputs of other shapes or types than the metadata says: runtimes only warn where a graph declares others.

    Raises
    ------
    ArtifactError
        Names the output, what was found and what was expected.
    """
    artifact = engine.artifact
    for name, found, shape in (
        ("probability", probability, artifact.output_shape),
        ("presence", presence, (len(artifact.labels.classes),)),
    ):
        expected = (images, *shape)
        if found is not None and (found.shape != expected or found.dtype != np.uint8):
            raise ArtifactError(
                f"{engine.provider} gives {name} as {found.dtype} {found.shape}, and the metadata promise uint8 "
                f"{expected}: export the artifact again with cloudrt-export"
            )
