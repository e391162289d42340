"""A server in a thread of this process, on a free port of the loopback interface, and plain requests to it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any
from uuid import uuid4

import uvicorn

from cloudrt.inference.pipeline import Segmenter
from cloudrt.serve.app import create_app
from cloudrt.serve.connections import connection_type
from cloudrt.serve.settings import ServeSettings

WAIT_S = 60


@dataclass(frozen=True)
class Answer:
    """An HTTP response; names of headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    port: int, path: str, body: bytes | Iterator[bytes] | None = None, headers: Mapping[str, str] | None = None
) -> Answer:
    """Send a request: POST with a body, GET without one. An iterator is sent in chunks, without its length."""
    connection = HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    try:
        with suppress(BrokenPipeError, ConnectionResetError):  # refused while it is sent
            connection.request("GET" if body is None else "POST", path, body, dict(headers or {}))
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, found, response.read())
    finally:
        connection.close()


@dataclass
class Server:
    """A running server."""

    port: int
    uvicorn: uvicorn.Server
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, path: str, body: bytes | Iterator[bytes] | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        return ask(self.port, path, body, headers)

    def upload(self, path: str, files: Sequence[tuple[str, bytes]], headers: Mapping[str, str] | None = None) -> Answer:
        """Send files as multipart/form-data (RFC 7578)."""
        boundary = uuid4().hex
        body = b"".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="images"; filename="{name}"\r\n\r\n'.encode()
            + data
            + b"\r\n"
            for name, data in files
        )
        body += f"--{boundary}--\r\n".encode()
        return self.ask(path, body, {"Content-Type": f"multipart/form-data; boundary={boundary}", **(headers or {})})

    def metric(self, name: str) -> float:
        """Return a metric; `name` includes its labels."""
        lines = self.ask("/metrics").body.decode().splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), 0.0)

    def stop(self) -> None:
        """Stop as SIGTERM does, and wait until it has stopped."""
        self.uvicorn.should_exit = True
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()


@contextmanager
def serving(segmenter: Segmenter, settings: ServeSettings | None = None, port: int = 0) -> Iterator[Server]:
    """Serve a model until the end of the block."""
    settings = settings or ServeSettings()
    http = connection_type(settings.transfer_timeout_s)
    config = uvicorn.Config(create_app(segmenter, settings), http=http, log_level="error", access_log=False)
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", port), backlog=512)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    running = Server(listener.getsockname()[1], server, thread)
    try:
        assert running.ask("/readyz").status == 200
        yield running
    finally:
        running.stop()
        listener.close()
