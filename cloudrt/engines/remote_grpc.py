"""The client of the Open Inference Protocol over gRPC, with tritonclient; gRPC itself limits sizes and time."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


class GrpcClient:
    """A connection over gRPC; the parameters are those of `cloudrt.engines.remote_http.HttpClient`."""

    def __init__(self, url: str, timeout_s: float, tensor_bytes: int) -> None:
        from tritonclient import grpc

        self._grpc = grpc
        scheme, _, address = url.rstrip("/").partition("://")
        limits = [
            ("grpc.max_send_message_length", grpc.MAX_GRPC_MESSAGE_SIZE),
            ("grpc.max_receive_message_length", min(tensor_bytes + MARGIN_BYTES, grpc.MAX_GRPC_MESSAGE_SIZE)),
        ]
        self._client = grpc.InferenceServerClient(address, ssl=scheme == "grpcs", channel_args=limits)
        self._call: dict[str, Any] = {"client_timeout": timeout_s}
        token = os.environ.get(TOKEN)
        if token:
            self._call["headers"] = {"authorization": f"Bearer {token}"}

    def metadata(self, name: str) -> dict[str, Any]:
        """Return the metadata of a model."""
        found: dict[str, Any] = self._ask("get_model_metadata", name, as_json=True)
        return found

    def config(self, name: str) -> dict[str, Any]:
        """Return the configuration of a model."""
        found = self._ask("get_model_config", name, as_json=True)
        config: dict[str, Any] = found.get("config", found)
        return config

    def infer(self, name: str, batch: NDArray[np.uint8], shapes: Shapes) -> dict[str, NDArray[np.uint8]]:
        """Return the outputs of a model for a batch, which have the names and shapes of `shapes`."""
        image = self._grpc.InferInput("image", list(batch.shape), "UINT8")
        image.set_data_from_numpy(np.ascontiguousarray(batch))
        wanted = [self._grpc.InferRequestedOutput(output) for output in shapes]
        answer = self._ask("infer", name, [image], outputs=wanted)
        found = {}
        for output, shape in shapes.items():
            described = answer.get_output(output)
            if described is None:
                continue
            check_type(output, described.datatype, list(described.shape), shape)
            try:
                found[output] = to_tensor(output, answer.as_numpy(output), shape)
            except (ValueError, LookupError) as error:  # of tritonclient
                raise ServerError(f"malformed output {output}: {error}") from error
        return require_all(found, shapes)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        from tritonclient.utils import InferenceServerException

        try:
            return getattr(self._client, method)(*arguments, **options, **self._call)
        except InferenceServerException as error:
            message, status = str(error.message()), error.status() or ""
            again = status in TRANSIENT and "larger than max" not in message
            raise ServerError(message, again=again, status=status) from error
