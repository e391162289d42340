"""Notice that the cluster is lost, before Ray ends the process without a message.

Ray ends a driver at once, with status 1 and without an exception, when its own node is gone or the head node has not
answered for a minute. A thread therefore polls both and reports the loss first.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

LOOK_SECONDS = 0.5
GRACE = {"this machine's part of the cluster": 1.0, "the head of the cluster": 45.0}
"""Seconds without an answer until each counts as lost. Ray's own limits are 0 for its node and 60 for the head."""

Address = tuple[str, int]


@contextmanager
def watched(lost: Callable[[str], object]) -> Iterator[None]:
    """Call `lost` with one line, from another thread, if the connected cluster is lost inside the block.

    No call of Ray returns after that, so `lost` should end the process.
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
    """Poll the addresses until `over` is set; call `lost` and return if one has not answered for its `GRACE`."""
    answered = dict.fromkeys(places, time.monotonic())
    while not over.wait(LOOK_SECONDS):
        for name, address in places.items():
            if _answers(address):
                answered[name] = time.monotonic()
            elif time.monotonic() - answered[name] > GRACE[name] and not over.is_set():
                lost(f"{name}, {address[0]}:{address[1]}, does not answer: start it again, then continue with --resume")
                return


def _answers(address: Address) -> bool:
    try:
        socket.create_connection(address, timeout=5).close()
    except OSError:
        return False
    return True
