"""A cluster that is lost altogether: noticed before Ray ends the process without a word.

Ray ends a driver whose own node is gone, or whose head has not answered for a minute, at once and with status 1: no
exception, no handler. So a thread looks whether they are there, and has the word first.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

LOOK_SECONDS = 0.5
GRACE = {"this machine's part of the cluster": 1.0, "the head of the cluster": 45.0}
"""Seconds without an answer after which each is lost: Ray gives up its own node at once, the head after 60."""

Address = tuple[str, int]


@contextmanager
def watched(lost: Callable[[str], object]) -> Iterator[None]:
    """Call `lost` with one line, from another thread, if the cluster that is connected goes away in between.

    Nothing of Ray returns after that: `lost` is best to end the process.
    """
    import ray

    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    mine = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    addresses = (mine["NodeManagerAddress"], mine["NodeManagerPort"]), (host.strip("[]"), int(port))
    places, over = dict(zip(GRACE, addresses, strict=True)), threading.Event()
    threading.Thread(target=look, args=(places, lost, over), daemon=True, name="cluster watch").start()
    try:
        yield
    finally:
        over.set()


def look(places: Mapping[str, Address], lost: Callable[[str], object], over: threading.Event) -> None:
    """Call `lost` once one of the places has not answered for its `GRACE`; return then, or when it is `over`."""
    answered = dict.fromkeys(places, time.monotonic())
    while not over.wait(LOOK_SECONDS):
        for name, address in places.items():
            if _answers(address):
                answered[name] = time.monotonic()
            elif time.monotonic() - answered[name] > GRACE[name] and not over.is_set():
                lost(f"{name}, {address[0]}:{address[1]}, is gone: start it again, and --resume goes on")
                return


def _answers(address: Address) -> bool:
    try:
        socket.create_connection(address, timeout=5).close()
    except OSError:
        return False
    return True
