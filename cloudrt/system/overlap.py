"""Work on threads, answers in order, a bounded lead: the one building block of everything here that overlaps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def overlap(
    pool: ThreadPoolExecutor,
    work: Callable[[A], B],
    items: Iterable[A],
    ahead: int,
    pulled: Callable[[int], object] | None = None,
) -> Iterator[B]:
    """Yield `work(item)` for each item in order, with up to `ahead` of them under way on the pool.

    Items are read lazily. Where the caller stops early or a piece of work raises, what has not begun is cancelled.
    `pulled` is called before each answer with how many lie ready.
    """
    window: deque[Future[B]] = deque()
    try:
        for item in items:
            window.append(pool.submit(work, item))
            if len(window) >= ahead:
                if pulled:
                    pulled(sum(future.done() for future in window))
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    finally:
        for future in window:
            future.cancel()
