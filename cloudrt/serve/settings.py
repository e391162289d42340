"""The options of the server that do not concern how the artifact runs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cloudrt.errors import DataError

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class ServeSettings:
    """How to serve a model.

    Parameters
    ----------
    host, port
        Address to listen on; port 0 takes a free port.
    name
        Name of the model in URLs and answers; "" uses the file name of the artifact without its suffix.
    token
        Bearer token that requests must have; if empty, they need none.
    allow_origins
        Origins that may call the API from a browser (CORS); "*" is any.
    max_upload_bytes
        Larger request bodies are refused while they are read.
    queue
        Largest number of requests in progress; further ones are refused with status 503.
    delay_s
        Longest time in seconds that a decoded image waits for others to share its batch.
    transfer_timeout_s
        Time limit in seconds for each of: the head of a request on an idle connection, its body, and reading its
        answer.

    Raises
    ------
    DataError
        A value out of range, a malformed token or origin, or a name with a slash.
    """

    host: str = LOOPBACK
    port: int = 8000
    name: str = ""
    token: str = ""
    allow_origins: tuple[str, ...] = ()
    max_upload_bytes: int = 64 * 2**20
    queue: int = 64
    delay_s: float = 0.005
    transfer_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise DataError(f"port must be from 0 to 65535, found {self.port}")
        if self.max_upload_bytes < 1 or self.queue < 1:
            raise DataError(
                f"max_upload_bytes and queue must be at least 1, found {self.max_upload_bytes} and {self.queue}"
            )
        if not 0 <= self.delay_s <= 10 or not self.transfer_timeout_s > 0:
            raise DataError(
                f"delay_s must be from 0 to 10 and transfer_timeout_s positive, found {self.delay_s} and "
                f"{self.transfer_timeout_s}"
            )
        if not (self.token.isascii() and self.token.isprintable()) or " " in self.token:
            raise DataError("the token must consist of printable ASCII characters without spaces")
        if "/" in self.name:
            raise DataError(f"--name {self.name}: the name of a model in URLs cannot contain a slash")
        for origin in self.allow_origins:
            if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise DataError(f"--allow-origin {origin}: expected an origin such as https://example.org, or *")

    @property
    def is_local(self) -> bool:
        """Whether only programs on this machine can connect."""
        return self.host in (LOOPBACK, "localhost", "::1")
