"""The engine for servers of the Open Inference Protocol, such as Triton and `cloudrt serve`, over HTTP or gRPC.

    batch --round-robin over the servers, retried with back-off--> server --> probability, presence

Decoding and post-processing run on this machine; only the network runs on the servers. The metadata of every server is
checked before the first batch, and must describe the same artifact.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloudrt.engines.base import Engine, check_batch
from cloudrt.engines.remote_client import RemoteClient, ServerError
from cloudrt.engines.remote_http import HttpClient
from cloudrt.engines.remote_metadata import read_parameters
from cloudrt.errors import ArtifactError, CloudrtError, ProviderError
from cloudrt.model.artifact import Artifact, read_artifact
from cloudrt.options import RemoteOptions
from cloudrt.system.files import sha256

logger = logging.getLogger(__name__)

BATCH_SIZE = 32
"""Default number of images per request, and the limit for a server that does not report one."""
STREAMS_PER_SERVER = 2
"""Default number of concurrent requests per server."""
LARGEST_TENSOR = 1 << 30
"""Largest tensor of one image, in bytes."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
"""Back-off after a failure of a server: the pause doubles with each consecutive failure, up to the longest."""


@dataclass(frozen=True)
class RemoteModel:
    """A model on one or several servers.

    Parameters
    ----------
    options
        The servers and the name of the model.
    artifact
        Metadata of the model.
    digest
        SHA-256 of the artifact's file if the servers report it, else of the model's parameters; with `options.rules`,
        of that file and the parameters.
    largest_batch
        Largest number of images per request.
    outputs
        Names of the model's outputs.
    """

    options: RemoteOptions
    artifact: Artifact
    digest: str
    largest_batch: int
    outputs: tuple[str, ...]

    @property
    def streams(self) -> int:
        """Number of concurrent requests."""
        return self.options.streams or STREAMS_PER_SERVER * len(self.options.urls)


def connect(options: RemoteOptions) -> RemoteModel:
    """Read and check the metadata of the model on every server.

    Raises
    ------
    ArtifactError
        A model without cloudrt's metadata, or whose tensors have wrong names, types or shapes; servers with different
        models.
    ProviderError
        A server does not answer, or does not have the model.
    """
    found = [_describe(url, options) for url in options.urls]
    for url, other in zip(options.urls[1:], found[1:], strict=True):
        if (other.artifact, other.digest, other.outputs) != (found[0].artifact, found[0].digest, found[0].outputs):
            raise ArtifactError(f"{options.urls[0]} and {url} serve different models named {options.model!r}")
    first = found[0]
    largest = min(one.largest_batch for one in found)
    return RemoteModel(options, first.artifact, first.digest, largest, first.outputs)


def _describe(url: str, options: RemoteOptions) -> RemoteModel:
    name, where = options.model, f"model {options.model!r} of {url}"
    try:
        with closing(_open_client(url, options.timeout_s)) as client:
            metadata = client.metadata(name)
            try:
                config = client.config(name)
            except ServerError as error:
                if not error.status:
                    raise
                logger.debug("%s has no configuration: %s", where, error)  # not every server supports this extension
                config = {}
        return _read_model(metadata, config, options, where)
    except ServerError as error:
        raise ProviderError(f"{where}: {error}") from error
    except CloudrtError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # A value of an unexpected type.
        raise ArtifactError(f"{where}: malformed metadata: {ascii(str(error))[:200]}") from error


def _open_client(url: str, timeout_s: float, tensor_bytes: int = 0) -> RemoteClient:
    if url.startswith("grpc"):
        from cloudrt.engines.remote_grpc import GrpcClient

        return GrpcClient(url, timeout_s, tensor_bytes)
    return HttpClient(url, timeout_s, tensor_bytes)


def _read_model(
    metadata: Mapping[str, Any], config: Mapping[str, Any], options: RemoteOptions, where: str
) -> RemoteModel:
    parameters = _strings(metadata.get("parameters")) | _strings(config.get("parameters"))
    if options.rules:
        artifact = read_artifact(options.rules)
        digest = _digest([sha256(options.rules), parameters])  # the server's model may change while the rules do not
    else:
        artifact, digest = read_parameters(parameters, where)
        digest = digest or _digest(parameters)
    outputs = _check_tensors(metadata, artifact, where)
    largest = int(config.get("max_batch_size") or BATCH_SIZE)
    if largest < 1:
        raise ArtifactError(f"{where}: malformed metadata: max_batch_size is {largest}")
    return RemoteModel(options, artifact, digest, largest, outputs)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _check_tensors(metadata: Mapping[str, Any], artifact: Artifact, where: str) -> tuple[str, ...]:
    """Check names, types and shapes of the tensors; return the names of the outputs."""
    expected = {"image": (*artifact.input_size, 3), **_output_shapes(artifact)}
    for name, wanted in expected.items():
        if math.prod(wanted) > LARGEST_TENSOR:
            raise ArtifactError(
                f"{where}: tensor {name!r} of shape {list(wanted)} is larger than {LARGEST_TENSOR:,} bytes per image"
            )
    tensors = [*metadata.get("inputs", ()), *metadata.get("outputs", ())]
    for tensor in tensors:
        shape = tuple(int(side) for side in tensor.get("shape", ()))
        found = expected.get(tensor.get("name"))
        if found is None or tensor.get("datatype") != "UINT8" or shape[1:] != found:
            raise ArtifactError(
                f"{where}: tensor {tensor.get('name')!r} is {tensor.get('datatype')} {list(shape)}, expected "
                + (f"UINT8 [-1, {', '.join(map(str, found))}]" if found else f"one of {', '.join(expected)}")
            )
    outputs = tuple(tensor["name"] for tensor in metadata.get("outputs", ()))
    if [tensor["name"] for tensor in metadata.get("inputs", ())] != ["image"] or "probability" not in outputs:
        raise ArtifactError(f"{where} must have the input 'image' and the output 'probability'")
    if "presence" not in outputs and any(rule.presence for rule in artifact.rules):
        raise ArtifactError(f"{where} has no output 'presence', which the rules need")
    return outputs


def _output_shapes(artifact: Artifact) -> dict[str, tuple[int, ...]]:
    """Return the shape of each possible output for one image."""
    return {"probability": artifact.output_shape, "presence": (len(artifact.labels.classes),)}


def _strings(parameters: Any) -> dict[str, str]:
    """Return the parameters of metadata, or of a configuration, whose values are strings."""
    found = {}
    for key, value in (parameters or {}).items():
        text = value.get("string_value", value.get("stringParam")) if isinstance(value, dict) else value
        if isinstance(text, str):
            found[key] = text
    return found


class RemoteEngine(Engine):
    """A model on servers; see `cloudrt.engines.base.Engine`.

    Parameters
    ----------
    model
        The model, from `connect`.
    batch_size
        The fixed N of every batch.

    Raises
    ------
    ProviderError
        The servers do not accept batches of this size.
    """

    def __init__(self, model: RemoteModel, batch_size: int) -> None:
        if batch_size > model.largest_batch:
            raise ProviderError(
                f"`batch_size={batch_size}`: the servers accept up to {model.largest_batch} images per request"
            )
        self.artifact, self.provider = model.artifact, "remote"
        self.batch_size: int | None = batch_size
        self.streams = model.streams
        self._model = model
        shapes = _output_shapes(model.artifact)
        self._shapes = {name: (batch_size, *shapes[name]) for name in model.outputs}
        self._lock = threading.Lock()
        self._servers = [_Server(url) for url in model.options.urls]
        self._next = 0
        self._idle: dict[str, list[RemoteClient]] = {}  # open connections to each server; protected by _lock

    def run(self, batch: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Return probability (N, C, W_out, H_out) and presence (N, C) or None; see `Engine.run`.

        Raises
        ------
        ProviderError
            All attempts failed, or a server refused the request or sent a response that cannot be used.
        """
        check_batch(batch, self.artifact, self.batch_size)
        last = ""
        for _ in range(self._model.options.attempts):
            server = self._take()
            try:
                with self._client(server.url) as client:
                    found = client.infer(self._model.options.model, batch, self._shapes)
            except ServerError as error:
                last = f"{server.url}: {error}"
                if not error.again:
                    raise ProviderError(last) from error
                pause = self._rest(server)
                logger.debug("%s; not used again for %.1f s", last, pause)
                continue
            server.failures = 0
            return found["probability"], found.get("presence")
        raise ProviderError(f"the batch failed after {self._model.options.attempts} attempts: {last}")

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            clients = [client for idle in self._idle.values() for client in idle]
            self._idle.clear()
        for client in clients:
            client.close()

    def _take(self) -> _Server:
        """Return the next server that is not in a back-off pause; wait if all are."""
        with self._lock:
            now = time.monotonic()
            count = len(self._servers)
            order = [self._servers[(self._next + offset) % count] for offset in range(count)]
            server = next((one for one in order if one.until <= now), None) or min(order, key=lambda one: one.until)
            self._next = self._servers.index(server) + 1
        time.sleep(max(0.0, server.until - now))
        return server

    def _rest(self, server: _Server) -> float:
        """Start the back-off pause of a server, unless another stream has; return its remaining seconds."""
        with self._lock:
            now = time.monotonic()
            if server.until <= now:
                pause = FIRST_PAUSE_S * 2.0 ** min(server.failures, 16)
                server.failures += 1
                server.until = now + min(pause, LONGEST_PAUSE_S)
            return server.until - now

    @contextmanager
    def _client(self, url: str) -> Iterator[RemoteClient]:
        """Yield a connection to a server; no other stream uses it at the same time."""
        with self._lock:
            idle = self._idle.setdefault(url, [])
            client = idle.pop() if idle else None
        size = sum(math.prod(shape) for shape in self._shapes.values())
        client = client or _open_client(url, self._model.options.timeout_s, size)
        try:
            yield client
        finally:
            with self._lock:
                idle.append(client)


@dataclass
class _Server:
    """A server, its number of consecutive failures, and the end of its back-off pause (monotonic time in seconds)."""

    url: str
    failures: int = 0
    until: float = 0.0
