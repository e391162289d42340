"""The client of the Open Inference Protocol over HTTP.

    request --> response of limited size and time --> JSON and binary tensors --> arrays

A response is limited in bytes, headers included, and in total time, however slowly or long the server sends. Redirects
are not followed and compressed responses are refused. Binary tensors are an extension of the protocol: servers without
it, such as MLServer, get and send JSON.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from http.client import (
    BadStatusLine,
    HTTPConnection,
    HTTPException,
    HTTPResponse,
    HTTPSConnection,
    IncompleteRead,
)
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
from numpy.typing import NDArray

from cloudrt.engines.limited_socket import LimitedSocket, too_large
from cloudrt.engines.remote_client import (
    MARGIN_BYTES,
    TRANSIENT,
    ServerError,
    Shapes,
    check_type,
    require_all,
    to_tensor,
)
from cloudrt.options import TOKEN

logger = logging.getLogger(__name__)

JSON_BYTES = 6
"""Bytes allowed for each element in JSON: three digits, a comma and two of white space."""
_JSON_ERRORS = (ValueError, RecursionError)


class HttpClient:
    """A connection over HTTP; see `cloudrt.engines.remote_client.RemoteClient`.

    Parameters
    ----------
    url
        Such as "http://HOST:8000".
    timeout_s
        Time limit of a request and its response, in seconds.
    tensor_bytes
        Largest total size of the output tensors of a response.

    Raises
    ------
    ServerError
        A URL without a host, or with an invalid port.
    """

    def __init__(self, url: str, timeout_s: float, tensor_bytes: int) -> None:
        parts = urlsplit(url)
        try:
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ServerError(str(error)) from error
        if not host:
            raise ServerError("the URL has no host")
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._connection = kind(host, port, timeout=timeout_s)
        self._path, self._timeout_s, self._tensor_bytes = parts.path.rstrip("/"), timeout_s, tensor_bytes
        token = os.environ.get(TOKEN)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._binary: bool | None = None  # None: not asked yet

    def metadata(self, name: str) -> dict[str, Any]:
        """Return the metadata of a model."""
        return _parse(self._ask("GET", f"models/{quote(name)}")[0])

    def config(self, name: str) -> dict[str, Any]:
        """Return the configuration of a model."""
        return _parse(self._ask("GET", f"models/{quote(name)}/config")[0])

    def infer(self, name: str, batch: NDArray[np.uint8], shapes: Shapes) -> dict[str, NDArray[np.uint8]]:
        """Return the outputs of a model for a batch, which have the names and shapes of `shapes`."""
        if self._binary is None:
            extensions = _parse(self._ask("GET", "")[0]).get("extensions")
            self._binary = isinstance(extensions, list) and "binary_tensor_data" in extensions
            if not self._binary:
                logger.info("The server has no binary tensors over HTTP: JSON is slower; use grpc:// if it has gRPC")
        batch = np.ascontiguousarray(batch)
        image: dict[str, Any] = {"name": "image", "shape": list(batch.shape), "datatype": "UINT8"}
        outputs: list[dict[str, Any]] = [{"name": output} for output in shapes]
        if self._binary:
            image["parameters"] = {"binary_data_size": batch.nbytes}
            outputs = [output | {"parameters": {"binary_data": True}} for output in outputs]
        else:
            image["data"] = batch.ravel().tolist()
        header = json.dumps({"inputs": [image], "outputs": outputs}).encode()
        headers, factor = {"Content-Type": "application/json"}, JSON_BYTES
        body: list[Any] = [header]
        if self._binary:
            headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(header))}
            body, factor = [header, batch.data.cast("B")], 1
        limit = factor * self._tensor_bytes + MARGIN_BYTES
        found, length = self._ask("POST", f"models/{quote(name)}/infer", body, headers, limit)
        return parse_outputs(found, length, shapes)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _ask(
        self,
        method: str,
        path: str,
        body: list[Any] | None = None,
        headers: Mapping[str, str] | None = None,
        limit: int = MARGIN_BYTES,
    ) -> tuple[bytes, str | None]:
        """Return the body of a response and the length of its JSON part; None if all of it is JSON."""
        headers = {**self._headers, **(headers or {})}
        if body is not None:
            headers["Content-Length"] = str(sum(len(part) for part in body))
        path = f"{self._path}/v2/{path}".rstrip("/")
        deadline = time.monotonic() + self._timeout_s
        try:
            reused = self._connection.sock is not None
            try:
                response = self._send(method, path, body, headers, deadline, limit)
            except ConnectionError:
                if not reused:
                    raise
                self._connection.close()  # the server closed the idle connection
                response = self._send(method, path, body, headers, deadline, limit)
            with response:
                return self._read(response, limit)
        except BaseException as error:
            self._connection.close()
            if not isinstance(error, (OSError, HTTPException, ValueError)):
                raise
            lost = isinstance(error, (OSError, IncompleteRead))
            raise ServerError(_reason(error, self._timeout_s), again=lost) from error

    def _send(
        self, method: str, path: str, body: Any, headers: Mapping[str, str], deadline: float, limit: int
    ) -> HTTPResponse:
        connection: Any = self._connection  # Any: the type of `sock` changes
        if connection.sock is None:
            connection.connect()
            connection.sock = LimitedSocket(connection.sock)
        connection.sock.limit(deadline, limit)
        connection.request(method, path, body, headers)
        response: HTTPResponse = connection.getresponse()
        return response

    def _read(self, response: HTTPResponse, limit: int) -> tuple[bytes, str | None]:
        status = response.status
        if status != 200:
            text = response.read(min(limit, 1 << 16))
            self._connection.close()  # the rest is not read
            place = response.getheader("Location")
            reason = f"redirects to {place}: give the address of the server itself" if place else _error_text(text)
            raise ServerError(f"status {status}: {reason}", again=str(status) in TRANSIENT, status=str(status))
        encoding = response.getheader("Content-Encoding", "identity")
        if encoding != "identity":
            raise ServerError(f"the response is compressed ({encoding}), which was not requested")
        if response.length is not None and response.length > limit:
            raise too_large(limit)
        return response.read(), response.getheader("Inference-Header-Content-Length")


def _reason(error: Exception, timeout_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no complete response within {timeout_s:g} s"
    if isinstance(error, BadStatusLine) and not isinstance(error, ConnectionError):
        return f"the response is not HTTP: {error}"
    return str(error) or type(error).__name__


def _error_text(body: bytes) -> str:
    """Return the protocol's error message, or the start of any other text."""
    try:
        found = json.loads(body)
        return str(found["error"])
    except (*_JSON_ERRORS, LookupError, TypeError):
        return body[:200].decode(errors="replace") or "no message"


def _parse(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except _JSON_ERRORS as error:
        raise ServerError(f"the response is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ServerError("the response is not a JSON object")
    return found


def parse_outputs(body: bytes, json_length: str | None, shapes: Shapes) -> dict[str, NDArray[np.uint8]]:
    """Return the tensors of a response over HTTP.

    Parameters
    ----------
    body
        JSON, followed by the binary tensors in the order of the JSON's outputs.
    json_length
        The header Inference-Header-Content-Length: length of the JSON in bytes; None if there are no binary tensors.
    shapes
        The expected outputs.

    Raises
    ------
    ServerError
        The response is not what the protocol specifies, or the tensors are not the expected ones.
    """
    place = len(body)
    if json_length is not None:
        if not json_length.isdecimal() or len(json_length) > 20 or int(json_length) > len(body):
            raise ServerError(
                f"Inference-Header-Content-Length is {json_length[:40]!r}, but the body has {len(body)} bytes"
            )
        place = int(json_length)
    outputs = _parse(body[:place]).get("outputs")
    if not isinstance(outputs, list) or not all(isinstance(output, dict) for output in outputs):
        raise ServerError("the response has no list of outputs")
    found, content = {}, np.frombuffer(body, np.uint8)
    for output in outputs:
        parameters = output.get("parameters")
        size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
        data: Any = output.get("data")
        if size is not None:
            if type(size) is not int or not 0 <= size <= len(body) - place:
                left = len(body) - place
                raise ServerError(f"binary_data_size is {ascii(size)[:40]}, but {left} bytes are left")
            data = content[place : place + size]
            place += size
        name = output.get("name")
        if isinstance(name, str) and name in shapes:
            check_type(name, output.get("datatype"), output.get("shape"), shapes[name])
            found[name] = to_tensor(name, data, shapes[name])
    if place != len(body):
        raise ServerError(f"the response has {len(body) - place} bytes beyond its tensors")
    return require_all(found, shapes)
