"""The engines of a run, one per device, with a common `run` that all threads of the pipeline call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Sequence
from threading import Condition, Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloudrt.engines.base import Engine
from cloudrt.errors import ArtifactError, CloudrtError, MemoryExhausted, ProviderError
from cloudrt.model.artifact import Artifact
from cloudrt.system.cuda import Batch, DeviceArray

logger = logging.getLogger(__name__)
_UINT8 = np.dtype(np.uint8)


class EnginePool:
    """Engines with the same batch size, which `step_down` halves when memory runs out.

    Parameters
    ----------
    open_one
        `open_one(device, batch_size)` returns an engine.
    devices
        GPU numbers; (0,) for a CPU.
    batch_size
        The fixed N at the start.

    Raises
    ------
    CloudrtError
        Raised by `open_one`; engines that are already open are closed.
    """

    def __init__(self, open_one: Callable[[int, int], Engine], devices: Sequence[int], batch_size: int) -> None:
        self._open_one, self._devices = open_one, tuple(devices)
        self.batch_size = batch_size
        self.engines: list[Engine] = []
        self.slots = 0  # number of threads that may run a batch at once
        self.artifact: Artifact  # the metadata of the model
        self._free: list[Engine] = []  # each engine once per idle stream
        self._turn = Condition()  # protects _free, _busy, _reopening and _error
        self._busy = 0  # number of busy streams
        self._reopening = False  # True while the engines are reopened: no thread may take one
        self._error: CloudrtError | None = None  # raised by all calls once the engines are closed or failed to reopen
        self._change = Lock()  # one `step_down` at a time
        self._open()

    @property
    def usable(self) -> bool:
        """False once the engines are closed or could not be opened again."""
        return self._error is None

    def empty(self, batches: int) -> NDArray[np.uint8]:
        """Return an uninitialised array for the images of `batches` batches, (n, H, W, 3) uint8."""
        with self._turn:
            self._turn.wait_for(lambda: self._error or not self._reopening)
            if self._error:
                raise self._error
            return self.engines[0].empty(batches)

    def takes(self, place: tuple[str, int]) -> bool:
        """Return whether every engine accepts arrays in the memory of the device `place`."""
        return all(getattr(engine, "place", None) == place for engine in self.engines)

    def run(self, images: Sequence[NDArray[np.uint8]] | Batch) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Return probability (n, C, W_out, H_out) and presence (n, C), or None, of n images (H, W, 3) uint8 RGB.

        An array of a whole batch, (N, H, W, 3), and an array on the device of the engines are used without a copy.
        Fewer images are copied to a batch that is padded with black images.

        Raises
        ------
        MemoryExhausted
            More images than the batch size, or not enough memory: call `step_down` and repeat with fewer images.
        CloudrtError
            An engine failed on the batch, the pool is closed, or its engines could not be opened again.
        """
        [outputs] = self.run_each([images])
        return outputs

    def run_each(
        self, batches: Iterable[Sequence[NDArray[np.uint8]] | Batch], size: int | None = None
    ) -> Generator[tuple[NDArray[np.uint8], NDArray[np.uint8] | None], None, None]:
        """Yield the outputs of several batches, all of one engine; see `run`.

        Raises MemoryExhausted too if another thread has changed the batch size from `size`. Close the generator, or let
        it end, before calling `step_down`.
        """
        engine = self._take()
        try:
            if size not in (None, self.batch_size):
                raise MemoryExhausted(f"the batch size is no longer {size}, but {self.batch_size}")
            for images in batches:
                yield self._run(engine, images)
        except MemoryError as error:
            raise MemoryExhausted(f"not enough memory for a batch of {engine.batch_size}: {error}") from error
        finally:
            with self._turn:
                self._free.append(engine)
                self._busy -= 1
                self._turn.notify_all()

    def _run(
        self, engine: Engine, images: Sequence[NDArray[np.uint8]] | Batch
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        count = len(images)
        size = engine.batch_size or count
        if count > size:
            raise MemoryExhausted(f"{count} images do not fit into batches of {size}")
        batch: Any = images
        if not (count == size and isinstance(images, np.ndarray)) and not isinstance(images, DeviceArray):
            batch = np.zeros((size, *images[0].shape), np.uint8)
            batch[:count] = images
        probability, presence = engine.run(batch)
        expected = (size, *self._output_shape)
        if probability.shape != expected or probability.dtype != _UINT8:
            raise _unexpected(engine, "probability", probability, expected)
        if presence is not None and (presence.shape != expected[:2] or presence.dtype != _UINT8):
            raise _unexpected(engine, "presence", presence, expected[:2])
        if count == size:
            return probability, presence
        return probability[:count], None if presence is None else presence[:count]

    def step_down(self, failed: int, reason: MemoryExhausted) -> None:
        """Reopen all engines with half the batch size, after a batch failed for lack of memory.

        Does nothing if another thread has already reduced the batch size below `failed`.

        Parameters
        ----------
        failed
            Batch size that failed.
        reason
            The error of that batch.

        Raises
        ------
        MemoryExhausted
            `reason`, if the batch size is already 1; or no smaller batch fits into memory either.
        CloudrtError
            The pool is closed, or the engines cannot be opened again.
        """
        with self._change:
            if self.batch_size < failed:
                return
            if self.batch_size == 1:
                raise reason
            self.resize(self.batch_size // 2)
            logger.warning("%s; continuing with batches of %d", reason, self.batch_size)

    def resize(self, batch_size: int) -> None:
        """Wait until all batches are done, then reopen the engines with this batch size, or less if memory runs out.

        Raises
        ------
        CloudrtError
            The pool is closed, or the engines cannot be opened again; later calls of `run` raise an error too.
        """
        with self._turn:
            self._turn.wait_for(lambda: self._error or not self._reopening)
            self._reopening = True
            self._turn.wait_for(lambda: self._error or not self._busy)
            if self._error:
                raise self._error
            self._free.clear()
            self._release()
            self.batch_size = batch_size
            try:
                self._open_smaller()
            except BaseException as error:
                self._error = (
                    error if isinstance(error, CloudrtError) else ProviderError(f"engines could not be opened: {error}")
                )
                raise
            finally:
                self._reopening = False
                self._turn.notify_all()

    def _open_smaller(self) -> None:
        """Open the engines; halve the batch size as long as there is not enough memory."""
        while True:
            try:
                return self._open()
            except MemoryExhausted:
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2

    def close(self) -> None:
        """Wait until all batches are done, then close the engines; later calls raise ProviderError."""
        with self._turn:
            self._error = self._error or ProviderError("the engines are closed: open a new Segmenter")
            self._turn.notify_all()
            self._turn.wait_for(lambda: not self._busy)
            self._release()

    def _take(self) -> Engine:
        with self._turn:
            while not self._error and (self._reopening or not self._free):
                self._turn.wait()
            if self._error:
                raise self._error
            self._busy += 1
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
        self._output_shape = self.artifact.output_shape


def _unexpected(engine: Engine, name: str, found: NDArray[np.uint8], expected: tuple[int, ...]) -> ArtifactError:
    """Return the error of an output whose shape or dtype is not that of the metadata; runtimes only log a warning."""
    return ArtifactError(
        f"{engine.provider} returns {name} as {found.dtype} {found.shape}, but the metadata specifies uint8 "
        f"{expected}: export the artifact again with cloudrt-export"
    )
