"""Connections of clients: bounded in number, and closed if the head of a request does not arrive in time.

uvicorn has a limit for the time between two requests, but none for the first one or for one that is cut off. Without
limits, clients that connect and send nothing would use all file descriptors, and no other client could connect.
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
    """Return uvicorn's protocol of HTTP with limits: see the module. `wait_s` is the time for the head of a request."""
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
            if not self.transport.is_closing():
                self._wait()

        def _wait(self) -> None:
            self._stop_waiting()
            self._timer = self.loop.call_later(wait_s, self._close_unused)

        def _stop_waiting(self) -> None:
            if self._timer:
                self._timer.cancel()

        def _close_unused(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Connection
