"""Client connections: limited in number, and closed if a request head does not arrive or an answer is not read in time.

uvicorn has a limit for the time between two requests, but none for the first one or for one that is cut off, and it
closes a connection only after the client has read everything. Without limits, clients that send or read nothing would
use all file descriptors, and no other client could connect.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

_Base: Any = AutoHTTPProtocol


def most_connections() -> int:
    """Return the largest number of open connections: half of the files that this process may open."""
    try:
        import resource
    except ImportError:  # Windows
        return sys.maxsize
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if files == resource.RLIM_INFINITY else files // 2


def connection_type(wait_s: float) -> type[asyncio.Protocol]:
    """Return uvicorn's HTTP protocol class with these limits.

    `wait_s` is the time limit, in seconds, for the arrival of a request head and for reading the end of an answer.
    """
    most = most_connections()

    class Connection(_Base):  # type: ignore[misc]
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.abort()
            else:
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._wait()

        def _wait(self) -> None:
            self._stop_waiting()
            self._timer = self.loop.call_later(wait_s, self._end_unused)

        def _stop_waiting(self) -> None:
            if self._timer:
                self._timer.cancel()

        def _end_unused(self) -> None:
            answering = self.cycle is not None and not self.cycle.response_complete
            if answering and not self.transport.is_closing():
                self._wait()
            else:
                self.transport.abort()  # `close` would wait until the client has read everything

    return Connection
