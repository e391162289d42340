"""Dynamic batching: images of concurrent requests share the batches of one Segmenter.

    request --decode threads--> image --queue, at most `delay_s`--> batch --engine threads--> levels --> RLE rows

A batch starts when it is full, when no other image is being decoded, or when its first image has waited for `delay_s`.
While all engines are busy, images accumulate, so that batches are full under load. Everything except decoding, the
engines and post-processing runs on the event loop: no locks.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import CloudrtError, ImageError, MemoryExhausted
from cloudrt.images.image import Image
from cloudrt.inference.pipeline import Segmenter
from cloudrt.masks.postprocess import apply_rules
from cloudrt.masks.rule import Rule

P = ParamSpec("P")
R = TypeVar("R")


class Overloaded(CloudrtError):
    """As many requests as allowed are in progress; try again later."""


@dataclass(frozen=True)
class Outputs:
    """The network's outputs for one image.

    Parameters
    ----------
    levels
        (C, W, H) uint8 probability on the transposed submission grid.
    presence
        (C,) uint8, or None.
    """

    levels: NDArray[np.uint8]
    presence: NDArray[np.uint8] | None


@dataclass(frozen=True)
class _Waiting:
    image: Image
    since: float
    done: asyncio.Future[Outputs] = field(repr=False)


async def together(works: Iterable[Coroutine[Any, Any, R]]) -> list[R]:
    """Run coroutines concurrently and return their results; the first exception cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


class Batcher:
    """Runs single images through a Segmenter, in batches; used from one event loop.

    Parameters
    ----------
    segmenter
        The open model.
    queue
        Largest number of requests in progress.
    delay_s
        See `ServeSettings`.
    on_batch
        Called with the number of images of each batch.
    """

    def __init__(
        self, segmenter: Segmenter, queue: int, delay_s: float, on_batch: Callable[[int], object] = lambda _: None
    ) -> None:
        self.segmenter = segmenter
        self.in_progress = 0  # requests
        self._queue, self._delay_s, self._on_batch = queue, delay_s, on_batch
        self._waiting: deque[_Waiting] = deque()
        self._arriving = 0  # images that are being decoded
        self._idle = segmenter.pool.slots
        self._timer: asyncio.TimerHandle | None = None
        # Decoded images in memory: the running and the next batch of every engine, and one per decoding thread.
        self._room = asyncio.Semaphore(segmenter.threads + 2 * segmenter.pool.slots * segmenter.batch_size)
        self.has_presence = self._warm_up()
        self._threads = ThreadPoolExecutor(segmenter.threads, "decode")
        self._engines = ThreadPoolExecutor(segmenter.pool.slots, "engine")

    async def request(self) -> AsyncIterator[None]:
        """Count a request as in progress until its answer is sent; a dependency of its route.

        Raises
        ------
        Overloaded
            As many requests as allowed are in progress.
        """
        if self.in_progress >= self._queue:
            raise Overloaded(f"{self.in_progress} requests are in progress: try again later")
        self.in_progress += 1
        try:
            yield
        finally:
            self.in_progress -= 1

    @property
    def waiting(self) -> int:
        """Number of decoded images that wait for an engine."""
        return len(self._waiting)

    async def segment(self, data: bytes, rules: Sequence[Rule]) -> tuple[list[str], Outputs]:
        """Segment the bytes of an image file: return the RLE text of each class by its rule, and the network's outputs.

        Raises
        ------
        ImageError
            The image cannot be decoded; the message is the reason that `cloudrt-infer` lists.
        """
        async with self._room:
            outputs = await self.infer(await self.decode(data))
        return await self.call(apply_rules, outputs.levels, rules, outputs.presence), outputs

    async def decode(self, data: bytes) -> Image:
        """Return an image, (H, W, 3) uint8 RGB, in the network's input size; see `segment` for the error."""
        self._arriving += 1
        try:
            return await self.call(self._decode, data)
        finally:
            self._arriving -= 1
            asyncio.get_running_loop().call_soon(self._dispatch)  # after this image is in the queue

    async def infer(self, image: Image) -> Outputs:
        """Return the network's outputs for an image in its input size."""
        waiting = _Waiting(image, time.monotonic(), asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        asyncio.get_running_loop().call_soon(self._dispatch)  # after the other images of the request
        return await waiting.done

    async def call(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a function on the threads that decode and post-process."""
        return await asyncio.wrap_future(self._threads.submit(work, *args, **kwargs))

    def close(self) -> None:
        """Release the threads; the Segmenter stays open."""
        if self._timer:
            self._timer.cancel()
        for pool in (self._threads, self._engines):
            pool.shutdown(wait=True, cancel_futures=True)

    def _warm_up(self) -> bool:
        """Run a black image, to load everything before the first request; return whether the model outputs presence."""
        (outputs,) = self._run([np.zeros((*self.segmenter.artifact.input_size, 3), np.uint8)])
        apply_rules(outputs.levels, self.segmenter.artifact.rules, outputs.presence)
        return outputs.presence is not None

    def _dispatch(self) -> None:
        """Start the batches that are due."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        while self._waiting and self._waiting[0].done.cancelled():
            self._waiting.popleft()
        while self._waiting and self._idle:
            size, left = self.segmenter.batch_size, self._waiting[0].since + self._delay_s - time.monotonic()
            if len(self._waiting) < size and self._arriving and left > 0:
                self._timer = asyncio.get_running_loop().call_later(left, self._dispatch)
                return
            batch: list[_Waiting] = []
            while self._waiting and len(batch) < size:
                waiting = self._waiting.popleft()
                if not waiting.done.cancelled():  # cancelled: client gone, or request failed
                    batch.append(waiting)
            if batch:
                self._start(batch)

    def _start(self, batch: list[_Waiting]) -> None:
        self._idle -= 1
        self._on_batch(len(batch))
        running = asyncio.wrap_future(self._engines.submit(self._run, [waiting.image for waiting in batch]))
        running.add_done_callback(lambda done: self._finish(batch, done))

    def _finish(self, batch: list[_Waiting], done: asyncio.Future[list[Outputs]]) -> None:
        self._idle += 1
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        for position, waiting in enumerate(batch):
            if waiting.done.done():
                continue
            if error:
                waiting.done.set_exception(error)
            else:
                waiting.done.set_result(done.result()[position])
        self._dispatch()

    def _decode(self, data: bytes) -> Image:
        image = np.empty((*self.segmenter.artifact.input_size, 3), np.uint8)
        reason = self.segmenter.decoding.load(data, image)
        if reason is not None:
            raise ImageError(reason)
        return image

    def _run(self, images: list[Image]) -> list[Outputs]:
        """Run a batch, with a smaller batch size after running out of memory."""
        pool, outputs = self.segmenter.pool, list[Outputs]()
        while len(outputs) < len(images):
            size = pool.batch_size
            try:
                probability, presence = pool.run(images[len(outputs) : len(outputs) + size])
            except MemoryExhausted as reason:
                pool.step_down(size, reason)
                continue
            outputs += [
                Outputs(levels, None if presence is None else presence[row]) for row, levels in enumerate(probability)
            ]
        return outputs
