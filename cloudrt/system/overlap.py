"""Bounded concurrent map: the building block of the pipeline, the search and the data-set tools."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

HANDOVER_S = 0.02
"""Upper limit, in seconds of work, for several batches passed to another thread at once; passing takes about 0.1 ms."""


def overlap(pool: ThreadPoolExecutor, work: Callable[[A], B], items: Iterable[A], ahead: int) -> Iterator[B]:
    """Yield `work(item)` for each item, in order, with up to `ahead` calls in flight on the pool.

    Items are read lazily. Calls that have not started are cancelled if the consumer stops early or a call raises.

    Parameters
    ----------
    pool
        Runs the calls.
    work
        Called with one item.
    items
        Read by the consumer's thread.
    ahead
        Largest number of calls in flight, which bounds memory.
    """
    window: deque[Future[B]] = deque()
    try:
        for item in items:
            window.append(pool.submit(work, item))
            if len(window) >= ahead:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    finally:
        for future in window:
            future.cancel()


def overlap_parts(
    pool: ThreadPoolExecutor, work: Callable[[A], B], items: Iterable[Iterable[A]], ahead: int
) -> Iterator[list[B]]:
    """Yield, for each item, the list of `work(part)` of its parts; see `overlap`.

    Parameters
    ----------
    pool
        Runs the calls, one per part.
    work
        Called with one part.
    items
        The parts of each item.
    ahead
        Largest number of items in flight.
    """
    window: deque[list[Future[B]]] = deque()
    try:
        for parts in items:
            window.append([])
            for part in parts:
                window[-1].append(pool.submit(work, part))
            if len(window) >= ahead:
                done = [future.result() for future in window[0]]
                window.popleft()
                yield done
        while window:
            done = [future.result() for future in window[0]]
            window.popleft()
            yield done
    finally:
        for futures in window:
            for future in futures:
                future.cancel()


class Pace:
    """Chooses how many batches are passed between threads at once.

    The number is the largest power of two with which a group of batches takes at most `HANDOVER_S`; at least 1.

    Parameters
    ----------
    most
        Largest number of images to pass at once, unless one batch has more.
    """

    def __init__(self, most: int = 512) -> None:
        self.most = most
        self.seconds_per_image = 0.0
        self._last = time.perf_counter()

    def arrived(self, images: int) -> None:
        """Update the rate after `images` have left the pipeline."""
        now = time.perf_counter()
        found = (now - self._last) / max(1, images)
        self._last = now
        weight = 0.25 if self.seconds_per_image else 1.0
        self.seconds_per_image += weight * (found - self.seconds_per_image)

    def batches(self, size: int) -> int:
        """Return the number of batches of `size` images to pass at once; 1 as long as the rate is unknown.

        It is a power of two, so that small changes of the rate rarely change the number, and the memory of earlier
        groups can be reused.
        """
        if not self.seconds_per_image:
            return 1
        number = min(int(HANDOVER_S / (size * self.seconds_per_image)), self.most // size)
        return 1 << max(0, number.bit_length() - 1)
