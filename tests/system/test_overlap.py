"""The bounded map: order, laziness, a bounded number in flight, what is cancelled; and `Pace`."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cloudrt.system import overlap as module
from cloudrt.system.overlap import Pace, overlap, overlap_parts


class Counted:
    """An iterable of 0, 1, ... `count` - 1, and how many of them were read."""

    def __init__(self, count: int) -> None:
        self.count, self.read = count, 0

    def __iter__(self) -> Iterator[int]:
        for item in range(self.count):
            self.read += 1
            yield item


@pytest.mark.parametrize("ahead", [1, 3, 50])
def test_results_are_in_order_and_few_are_in_flight(ahead: int) -> None:
    items = Counted(20)
    with ThreadPoolExecutor(4) as pool:
        for position, result in enumerate(overlap(pool, lambda item: -item, items, ahead)):
            assert result == -position
            assert items.read <= position + ahead
    assert items.read == 20


@pytest.mark.parametrize("ahead", [1, 3, 50])
def test_an_items_parts_come_back_together(ahead: int) -> None:
    items = Counted(20)

    def parts() -> Iterator[Iterator[tuple[int, int]]]:
        for item in items:
            yield ((item, part) for part in range(item % 4))  # some without any

    with ThreadPoolExecutor(4) as pool:
        for position, results in enumerate(overlap_parts(pool, lambda pair: pair, parts(), ahead)):
            assert results == [(position, part) for part in range(position % 4)]
            assert items.read <= position + ahead
    assert items.read == 20


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("close", [False, True])
def test_an_error_or_a_close_cancels_what_has_not_begun(split: bool, close: bool) -> None:
    begun: set[int] = set()
    gate = threading.Event()

    def work(item: int) -> int:
        begun.add(item)
        if item == 1 and not close:
            raise LookupError("the caller's own")
        if item:
            gate.wait(10)
        return item

    with ThreadPoolExecutor(1) as pool:
        results: Iterator[object]
        results = (
            overlap_parts(pool, work, ([item] for item in range(100)), 9)
            if split
            else overlap(pool, work, range(100), 9)
        )
        assert next(results) in (0, [0])
        if close:
            results.close()  # type: ignore[attr-defined]
        else:
            with pytest.raises(LookupError, match="the caller's own"):
                next(results)
        gate.set()
    assert begun <= {0, 1, 2}


@pytest.mark.parametrize("split", [False, True])
def test_nothing_scans_what_is_in_flight(split: bool) -> None:
    """The lines of the module that are executed per item do not depend on the number in flight."""

    def lines(ahead: int) -> int:
        count = 0

        def trace(frame: Any, _event: str, _: object) -> Any:
            nonlocal count
            if frame.f_code.co_filename != module.__file__:
                return None
            count += 1
            return trace

        with ThreadPoolExecutor(1) as pool:
            results: Iterator[object]
            results = overlap_parts(pool, abs, ([item] for item in range(400)), ahead)
            results = results if split else overlap(pool, abs, range(400), ahead)
            before = sys.gettrace()
            sys.settrace(trace)
            try:
                assert sum(1 for _ in results) == 400
            finally:
                sys.settrace(before)
        return count

    assert lines(200) < 1.5 * lines(4)


def test_the_pace_follows_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    pace = Pace(most=256)
    assert pace.batches(8) == 1  # nothing has arrived
    for seconds, size, wanted in (
        (1.0, 8, 1),  # a second per image
        (module.HANDOVER_S / 64, 8, 8),
        (module.HANDOVER_S / 64, 64, 1),
        (module.HANDOVER_S / 64, 100, 1),
        (module.HANDOVER_S / 64, 9, 4),  # powers of two
        (1e-9, 24, 8),
        (1e-9, 8, 32),  # no more than 256 images
        (1e-9, 300, 1),
    ):
        for _ in range(200):
            now += seconds * 16 * 1.000001 if seconds == 1.0 else seconds * 16 * 0.999
            pace.arrived(16)
        assert pace.batches(size) == wanted, (seconds, size)
