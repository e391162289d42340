"""How exceptions become answers."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException  # also of unknown routes
from starlette.requests import ClientDisconnect

from cloudrt.errors import CloudrtError
from cloudrt.serve.batcher import Overloaded
from cloudrt.serve.inference_protocol import ProtocolError

RETRY_AFTER_S = 1


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
