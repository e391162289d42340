"""One interface to tritonclient's HTTP and gRPC clients, and to their exceptions.

Binary tensors are a part of the protocol over gRPC, and an extension of it over HTTP: servers without the extension,
such as MLServer, get and send JSON.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, Self
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from cloudrt.options import TOKEN

logger = logging.getLogger(__name__)

TRANSIENT = (
    *("408", "429", "500", "502", "503", "504", "StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED"),
    *("StatusCode.RESOURCE_EXHAUSTED", "StatusCode.ABORTED", "StatusCode.CANCELLED", "StatusCode.INTERNAL"),
)
"""HTTP and gRPC statuses after which the batch is sent again."""


class RemoteClient:
    """Common interface of tritonclient's HTTP and gRPC clients, which differ in arguments and format of metadata."""

    def __init__(
        self, module: Any, client: Any, as_json: dict[str, Any], call: dict[str, Any], form: dict[str, Any] | None
    ) -> None:
        self._module, self._client, self._as_json, self._call = module, client, as_json, call
        self._form = form  # arguments of tensors; None: depends on the server

    def metadata(self, name: str) -> dict[str, Any]:
        """Return the metadata of a model."""
        found: dict[str, Any] = self._client.get_model_metadata(name, **self._as_json)
        return found

    def config(self, name: str) -> dict[str, Any]:
        """Return the configuration of a model."""
        found: dict[str, Any] = self._client.get_model_config(name, **self._as_json)
        if not isinstance(found, dict):
            raise ValueError("the configuration is not an object")
        config: dict[str, Any] = found.get("config", found)
        return config

    def infer(self, name: str, batch: NDArray[np.uint8], outputs: tuple[str, ...]) -> dict[str, NDArray[np.uint8]]:
        """Return the outputs of a model for a batch."""
        if self._form is None:
            described = self._client.get_server_metadata(**self._call)
            extensions = (described.get("extensions") if isinstance(described, dict) else None) or ()
            self._form = {"binary_data": "binary_tensor_data" in extensions}
            if not self._form["binary_data"]:
                logger.info("The server has no binary tensors over HTTP: JSON is slower; use grpc:// if it has gRPC")
        tensor = self._module.InferInput("image", list(batch.shape), "UINT8")
        tensor.set_data_from_numpy(np.ascontiguousarray(batch), **self._form)
        wanted = [self._module.InferRequestedOutput(output, **self._form) for output in outputs]
        answer = self._client.infer(name, [tensor], outputs=wanted, **self._call)
        found = {output: answer.as_numpy(output) for output in outputs}
        missing = [output for output, array in found.items() if array is None]
        if missing:
            raise ConnectionError(f"the response has no output {', '.join(missing)}")
        return found

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_client(url: str, timeout_s: float) -> RemoteClient:
    """Return a client of a server, whose requests fail after `timeout_s` seconds."""
    parts = urlsplit(url)
    token = os.environ.get(TOKEN)
    address = url.partition("://")[2].rstrip("/")
    if parts.scheme in ("grpc", "grpcs"):
        from tritonclient import grpc

        client = grpc.InferenceServerClient(address, ssl=parts.scheme == "grpcs")
        call: dict[str, Any] = {"client_timeout": timeout_s}
        if token:
            call["headers"] = {"authorization": f"Bearer {token}"}
        return RemoteClient(grpc, client, {"as_json": True, **call}, call, {})
    from tritonclient import http

    client = http.InferenceServerClient(
        address, connection_timeout=timeout_s, network_timeout=timeout_s, ssl=parts.scheme == "https"
    )
    headers = {"headers": {"Authorization": f"Bearer {token}"}} if token else {}
    return RemoteClient(http, client, headers, headers, None)


def failures() -> tuple[type[Exception], ...]:
    """Return the exceptions of a request; `ValueError` is raised for malformed responses, such as truncated JSON."""
    from geventhttpclient.response import HTTPParseError
    from tritonclient.utils import InferenceServerException

    return InferenceServerException, HTTPParseError, OSError, ValueError, KeyError, RecursionError


def status_of(error: Exception) -> str | None:
    """Return the status of a response; None if there was no valid response."""
    status: Callable[[], str | None] | None = getattr(error, "status", None)
    return status() if callable(status) else None


def brief(error: Exception) -> str:
    """Return the message of an exception."""
    message: Callable[[], str] | None = getattr(error, "message", None)
    return str(message() if callable(message) else error).strip() or type(error).__name__
