"""The Open Inference Protocol v2 over HTTP, with Triton's extensions for binary tensors and model configuration.

It exposes the artifact's own tensors (input `image`, outputs `probability` and `presence`), so that clients such as
`tritonclient.http` and `cloudrt-infer --remote` decode and post-process themselves. The protocol is specified in
github.com/kserve/open-inference-protocol, and its extensions in docs/protocol of
github.com/triton-inference-server/server.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from numpy.typing import NDArray

from cloudrt.engines.remote_client import read_numbers
from cloudrt.engines.remote_metadata import model_parameters
from cloudrt.serve.batcher import Batcher, Outputs, together
from cloudrt.serve.settings import ServeSettings
from cloudrt.serve.uploads import read_body, unless_gone
from cloudrt.system.versions import VERSION

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_BATCH = 256
"""Largest number of images per request."""
VERSION_OF_MODEL = "1"
EXTENSIONS = ["binary_tensor_data", "model_configuration"]
_INFER_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"type": "object", "required": ["inputs"]}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


class ProtocolError(Exception):
    """A request that the protocol does not allow, or for a model that is not served."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def protocol_router(batcher: Batcher, settings: ServeSettings, name: str, protected: Sequence[Any]) -> APIRouter:
    """Return the routes below /v2; `protected` are the dependencies of all but the health checks."""
    responses: dict[int | str, dict[str, Any]] = {
        status: {"description": words, "content": {"application/json": {}}}
        for status, words in (
            (400, "Malformed request."),
            (401, "No valid token."),
            (404, "No such model."),
            (408, "The body did not arrive in time."),
            (413, "The body is too large."),
            (503, "Too many requests are in progress."),
        )
    }
    router = APIRouter(tags=["Open Inference Protocol"])
    guarded = APIRouter(dependencies=list(protected), responses=responses)
    tensors = _Tensors(batcher)

    def check(model: str, version: str = VERSION_OF_MODEL) -> None:
        if model != name or version != VERSION_OF_MODEL:
            known = f"{name!r} of version {VERSION_OF_MODEL}"
            raise ProtocolError(f"no model {model!r} of version {version}: this server has {known}", 404)

    def readiness() -> Response:
        return Response(status_code=200 if batcher.segmenter.pool.usable else 503)

    @router.get("/v2/health/live", response_class=Response)
    async def live() -> Response:
        """Whether the server runs."""
        return Response(status_code=200)

    @router.get(
        "/v2/health/ready", response_class=Response, responses={503: {"description": "The model can no longer run."}}
    )
    async def server_ready() -> Response:
        """Whether the server can run inference."""
        return readiness()

    @guarded.get("/v2")
    async def server() -> dict[str, Any]:
        """Describe the server."""
        return {"name": "cloudrt", "version": VERSION, "extensions": EXTENSIONS}

    @guarded.get("/v2/models/{model}/ready", response_class=Response)
    @guarded.get("/v2/models/{model}/versions/{version}/ready", response_class=Response)
    async def ready(model: str, version: str = VERSION_OF_MODEL) -> Response:
        """Whether a model can run inference."""
        check(model, version)
        return readiness()

    @guarded.get("/v2/models/{model}")
    @guarded.get("/v2/models/{model}/versions/{version}")
    async def metadata(model: str, version: str = VERSION_OF_MODEL) -> dict[str, Any]:
        """Describe a model's tensors."""
        check(model, version)
        return tensors.metadata(name)

    @guarded.get("/v2/models/{model}/config")
    @guarded.get("/v2/models/{model}/versions/{version}/config")
    async def config(model: str, version: str = VERSION_OF_MODEL) -> dict[str, Any]:
        """Return a model's configuration, as Triton does; its parameters hold the metadata of the artifact."""
        check(model, version)
        return tensors.config(name)

    slot = [Depends(batcher.request)]

    @guarded.post("/v2/models/{model}/infer", response_class=JSONResponse, openapi_extra=_INFER_BODY, dependencies=slot)
    @guarded.post(
        "/v2/models/{model}/versions/{version}/infer",
        response_class=JSONResponse,
        openapi_extra=_INFER_BODY,
        dependencies=slot,
    )
    async def infer(request: Request, model: str, version: str = VERSION_OF_MODEL) -> Response:
        """Run the network on a batch of images in its input size."""
        check(model, version)
        if request.headers.get("content-encoding", "identity") != "identity":
            raise ProtocolError("compressed requests are not supported")
        body = await read_body(request, settings)
        images, wanted, given = await batcher.call(tensors.parse, body, request.headers.get(HEADER_LENGTH))
        outputs = await unless_gone(request, together(batcher.infer(image) for image in images))
        answer = {"model_name": name, "model_version": VERSION_OF_MODEL} | given
        return await batcher.call(_response, answer, outputs, wanted)

    router.include_router(guarded)
    return router


def _response(answer: dict[str, Any], outputs: list[Outputs], wanted: dict[str, bool]) -> Response:
    """Return the wanted outputs of all images, each in JSON or as binary data after it."""
    arrays = {
        "probability": [one.levels for one in outputs],
        "presence": [one.presence for one in outputs if one.presence is not None],
    }
    described, rest = [], []
    for name, binary in wanted.items():
        array = np.stack(arrays[name])
        one: dict[str, Any] = {"name": name, "datatype": "UINT8", "shape": list(array.shape)}
        if binary:
            rest.append(array.tobytes())
            one["parameters"] = {"binary_data_size": array.nbytes}
        else:
            one["data"] = array.ravel().tolist()
        described.append(one)
    head = json.dumps(answer | {"outputs": described}).encode()
    if not rest:
        return Response(head, media_type="application/json")
    headers = {HEADER_LENGTH: str(len(head))}
    return Response(b"".join([head, *rest]), media_type="application/octet-stream", headers=headers)


class _Tensors:
    """The model's input and outputs: descriptions, and parsing of requests."""

    def __init__(self, batcher: Batcher) -> None:
        segmenter = batcher.segmenter
        self._artifact, self._digest = segmenter.artifact, segmenter.identity().artifact
        self._batch_size = segmenter.batch_size
        self._input = (*self._artifact.input_size, 3)
        self._outputs: dict[str, tuple[int, ...]] = {"probability": self._artifact.output_shape}
        if batcher.has_presence:
            self._outputs["presence"] = (len(self._artifact.labels.classes),)

    def metadata(self, name: str) -> dict[str, Any]:
        def tensor(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
            return {"name": name, "datatype": "UINT8", "shape": [-1, *shape]}

        return {
            "name": name,
            "versions": [VERSION_OF_MODEL],
            "platform": "cloudrt",
            "inputs": [tensor("image", self._input)],
            "outputs": [tensor(output, shape) for output, shape in self._outputs.items()],
        }

    def config(self, name: str) -> dict[str, Any]:
        def tensor(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
            return {"name": name, "data_type": "TYPE_UINT8", "dims": list(shape)}

        parameters = model_parameters(self._artifact, self._digest)
        return {
            "name": name,
            "platform": "cloudrt",
            "max_batch_size": MAX_BATCH,
            "input": [tensor("image", self._input)],
            "output": [tensor(output, shape) for output, shape in self._outputs.items()],
            "dynamic_batching": {"preferred_batch_size": [self._batch_size]},
            "parameters": {key: {"string_value": value} for key, value in parameters.items()},
        }

    def parse(
        self, body: bytes, header_length: str | None
    ) -> tuple[NDArray[np.uint8], dict[str, bool], dict[str, str]]:
        """Return images, (n, H, W, 3); output -> whether it is sent as binary data; and the request's "id", if any.

        The rest of the JSON, which takes many times the memory of the body, is not kept.
        """
        size = len(body)
        if header_length is not None:
            if not re.fullmatch("[0-9]{1,20}", header_length) or int(header_length) > len(body):
                raise ProtocolError(f"{HEADER_LENGTH} must be a number up to {len(body)}, found {header_length!r:.80}")
            size = int(header_length)
        try:
            asked = json.loads(body[:size])
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"the request is not JSON: {error}") from error
        inputs = asked.get("inputs") if isinstance(asked, dict) else None
        if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
            raise ProtocolError("a request must have one input, named 'image'")
        given = {"id": asked["id"]} if isinstance(asked.get("id"), str) else {}
        wanted = self._wanted(asked)
        return self._images(inputs[0], body, size), wanted, given

    def _images(self, one: dict[str, Any], body: bytes, size: int) -> NDArray[np.uint8]:
        """Return the images of an input, whose binary data begin at the position `size` of the body."""
        shape = one.get("shape")
        if one.get("name") != "image" or one.get("datatype") != "UINT8" or not isinstance(shape, list):
            raise ProtocolError("the input must be 'image' of the datatype UINT8, with a shape")
        if len(shape) != 4 or tuple(shape[1:]) != self._input or set(map(type, shape)) != {int}:
            raise ProtocolError(
                f"the shape of 'image' must be [n, {', '.join(map(str, self._input))}], found {shape!r:.80}"
            )
        if not 1 <= shape[0] <= MAX_BATCH:
            raise ProtocolError(f"a request must have 1 to {MAX_BATCH} images, found {shape[0]!r:.20}")
        parameters = _parameters(one)
        stated, length = parameters.get("binary_data_size"), math.prod(shape)
        if stated is None:
            try:
                return read_numbers(one.get("data"), length).reshape(shape)
            except ValueError as error:
                raise ProtocolError(f"the data of 'image' is malformed: {error}") from error
        if stated != length or len(body) - size != length:
            raise ProtocolError(f"'image' must have {length} bytes, found {len(body) - size}, stated {stated!r:.20}")
        return np.frombuffer(body, np.uint8, length, size).reshape(shape)

    def _wanted(self, asked: dict[str, Any]) -> dict[str, bool]:
        """Return output -> whether it is sent as binary data."""
        default = bool(_parameters(asked).get("binary_data_output", False))
        outputs = asked.get("outputs")
        if outputs is None or outputs == []:
            return dict.fromkeys(self._outputs, default)
        if not isinstance(outputs, list) or not all(isinstance(one, dict) for one in outputs):
            raise ProtocolError("outputs must be a list of objects")
        wanted = {}
        for one in outputs:
            name, parameters = one.get("name"), _parameters(one)
            if not isinstance(name, str) or name not in self._outputs:
                raise ProtocolError(f"no output {name!r:.80}: {', '.join(self._outputs)}")
            if parameters.get("classification"):
                raise ProtocolError("the extension 'classification' is not supported")
            wanted[name] = bool(parameters.get("binary_data", default))
        return wanted


def _parameters(values: dict[str, Any]) -> dict[str, Any]:
    parameters = values.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise ProtocolError("parameters must be an object")
    return parameters
