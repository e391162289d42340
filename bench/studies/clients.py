"""The clients of the study of the server: connections of one process, which sends prepared requests.

The clients run on the same cores as the server. They receive whole answers but parse only the headers, so that they use
little CPU time.
"""

from __future__ import annotations

import re
import resource
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class ClientConnection:
    """A connection of a client, and the request that is sent on it."""

    link: socket.socket
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))
    head: bytes = b""
    left: int = 0  # bytes of the answer's body still to be read; -1 before its length is known
    arrived: float = 0.0
    busy: bool = False

    def begin(self, request: bytes, arrived: float) -> None:
        """Prepare to send a request that arrived at a time of `time.perf_counter`."""
        self.unsent, self.head, self.left, self.arrived, self.busy = memoryview(request), b"", -1, arrived, True

    def send(self) -> None:
        """Send what the socket takes."""
        try:
            while self.unsent:
                self.unsent = self.unsent[self.link.send(self.unsent) :]
        except BlockingIOError:
            pass

    def receive(self, room: bytearray) -> bool:
        """Read what has arrived; return whether the answer is complete."""
        count = self.link.recv_into(room)
        if not count:
            raise ConnectionError("the server has closed a connection")
        if self.left < 0:
            self.head += room[:count]
            head, separator, rest = self.head.partition(b"\r\n\r\n")
            if not separator:
                return False
            if not head.startswith(b"HTTP/1.1 200"):
                raise ConnectionError(self.head.decode(errors="replace"))
            length = re.search(rb"(?i)content-length: (\d+)", head)
            assert length
            self.left, count = int(length[1]), len(rest)
        self.left -= count
        self.busy = self.left > 0
        return not self.busy


def send_all(port: int, requests: Sequence[bytes], arrivals: Sequence[float] | None, clients: int) -> dict[str, Any]:
    """Send requests over `clients` connections.

    Parameters
    ----------
    port
        Port of the server on this machine.
    requests
        The requests, as bytes.
    arrivals
        Seconds from the start at which they arrive; None sends each as soon as a connection is free.
    clients
        Number of connections.

    Returns
    -------
    dict
        `seconds`; the `latency_ms` of all requests; `client_cpu_s`, the CPU time of this process.

    Raises
    ------
    ConnectionError
        An answer with another status than 200, or a connection that the server closes during a request.
    """
    selector, room, latencies, sent = selectors.DefaultSelector(), bytearray(1 << 18), list[float](), 0

    def connect() -> ClientConnection:
        connection = ClientConnection(socket.create_connection(("127.0.0.1", port)))
        connection.link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.link.setblocking(False)
        selector.register(connection.link, selectors.EVENT_READ, connection)
        return connection

    def close(connection: ClientConnection) -> None:
        selector.unregister(connection.link)
        connection.link.close()

    free = [connect() for _ in range(clients)]
    began, busy = time.perf_counter(), cpu_seconds(resource.RUSAGE_SELF)
    times = [began] * len(requests) if arrivals is None else [began + one for one in arrivals]
    try:
        while len(latencies) < len(requests):
            now = time.perf_counter()
            while sent < len(requests) and free and times[sent] <= now:
                connection = free.pop()  # the last one used: the server closes idle connections
                connection.begin(requests[sent], now if arrivals is None else times[sent])
                selector.modify(connection.link, selectors.EVENT_READ | selectors.EVENT_WRITE, connection)
                sent += 1
            for key, events in selector.select(max(0.0, times[sent] - now) if sent < len(requests) and free else None):
                connection = key.data
                if not connection.busy:
                    close(connection)
                    free[free.index(connection)] = connect()
                    continue
                if events & selectors.EVENT_WRITE:
                    connection.send()
                    if not connection.unsent:
                        selector.modify(connection.link, selectors.EVENT_READ, connection)
                if events & selectors.EVENT_READ and connection.receive(room):
                    latencies.append(1000 * (time.perf_counter() - connection.arrived))
                    free.append(connection)
        seconds = time.perf_counter() - began
    finally:
        for key in list(selector.get_map().values()):
            close(key.data)
        selector.close()
    return {
        "seconds": seconds,
        "latency_ms": latencies,
        "client_cpu_s": cpu_seconds(resource.RUSAGE_SELF) - busy,
    }


def cpu_seconds(who: int) -> float:
    """Return the CPU time of this process, or of its children that have ended."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def request_of(data: bytes) -> bytes:
    """Return a request for the RLE texts of an image."""
    head = f"POST /v1/segment HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data
