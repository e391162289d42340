"""A socket with a deadline and a limit on the bytes received, for servers that respond slowly or never stop sending."""

from __future__ import annotations

import io
import time
from typing import Any

from cloudrt.engines.remote_client import ServerError


class LimitedSocket:
    """A connected socket with a deadline, and a limit on the bytes received, for one request at a time."""

    def __init__(self, connected: Any) -> None:
        self._socket = connected

    def limit(self, deadline: float, received: int) -> None:
        """Set the limits of a request: its deadline on the clock `time.monotonic`, and the maximum number of bytes."""
        self._deadline, self._limit, self._left = deadline, received, received

    def sendall(self, data: Any) -> None:
        """Send all data; raise TimeoutError after the deadline."""
        self.set_timeout()
        self._socket.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Return a file object that reads the received bytes.

        The connection stays open until both this file object and the socket are closed.
        """
        return io.BufferedReader(_Received(self, self._socket.makefile("rb", buffering=0)))

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def received(self, count: int) -> None:
        """Count received bytes; raise ServerError beyond the limit."""
        self._left -= count
        if self._left < 0:
            raise too_large(self._limit)

    def set_timeout(self) -> None:
        """Limit the next operation to the time that is left; raise TimeoutError after the deadline."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)


class _Received(io.RawIOBase):
    def __init__(self, limited: LimitedSocket, file: Any) -> None:
        self._limited, self._file = limited, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._limited.set_timeout()
        count: int = self._file.readinto(buffer)
        self._limited.received(count)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def too_large(limit: int) -> ServerError:
    """Return the error of a response that is larger than `limit` bytes."""
    return ServerError(f"the response is larger than the limit of {limit:,} bytes")
