"""What is refused, and how exceptions become answers."""

from __future__ import annotations

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException  # also of unknown routes
from starlette.requests import ClientDisconnect

from cloudrt.errors import CloudrtError
from cloudrt.serve.batcher import Overloaded
from cloudrt.serve.inference_protocol import ProtocolError

RETRY_AFTER_S = 1


def accepted(header: str) -> str:
    """Return the first of the media types in an Accept header that the interface has; JSON without a header."""
    choices: list[tuple[float, str]] = []
    for part in header.split(",") if header.strip() else ["*/*"]:
        kind, *parameters = (word.strip().lower() for word in part.split(";"))
        weight = next((word[2:] for word in parameters if word.startswith("q=")), "1")
        try:
            quality = float(weight)
        except ValueError:
            quality = 0.0
        for offered, patterns in (
            ("application/json", ("application/json", "application/*", "*/*")),
            ("image/png", ("image/png", "image/*")),
        ):
            if kind in patterns and quality > 0:
                choices.append((quality, offered))
    if not choices:
        raise HTTPException(406, "the answer is application/json or image/png")
    return max(choices, key=lambda choice: choice[0])[1]


def handle_errors(app: FastAPI) -> None:
    """Turn exceptions into answers; those of the Open Inference Protocol have the key "error"."""

    def answer(request: Request, status: int, message: str, headers: dict[str, str] | None = None) -> Response:
        key = "error" if request.url.path.startswith("/v2") else "detail"
        return JSONResponse({key: message}, status, headers)

    @app.exception_handler(AnyHTTPException)
    async def refused(request: Request, error: AnyHTTPException) -> Response:
        return answer(request, error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        words = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        return answer(request, 422, "; ".join(words))

    @app.exception_handler(ProtocolError)
    async def malformed(request: Request, error: ProtocolError) -> Response:
        return answer(request, error.status, str(error))

    @app.exception_handler(Overloaded)
    async def overloaded(request: Request, error: Overloaded) -> Response:
        # The connection is closed because the body is not read.
        return answer(request, 503, str(error), {"Retry-After": str(RETRY_AFTER_S), "Connection": "close"})

    @app.exception_handler(CloudrtError)
    async def failed(request: Request, error: CloudrtError) -> Response:
        return answer(request, 500, str(error))

    @app.exception_handler(ClientDisconnect)
    async def gone(_request: Request, _error: ClientDisconnect) -> Response:
        return Response(status_code=499)
