"""Sending answers in pieces and within a time limit, so that clients that do not read hold no memory for long."""

from __future__ import annotations

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

PIECE_BYTES = 1 << 18
"""Largest piece; the server waits until the client has read most of it before it sends the next one."""


class _NotReadError(Exception):
    """The client has not read its answer in time."""


class SendInPieces:
    """Middleware that sends an answer in pieces, and closes the connection if it is not read within `limit_s` seconds.

    Without it, the server would keep the whole answer in memory, and the request would end before the answer is sent.
    """

    def __init__(self, app: ASGIApp, limit_s: float) -> None:
        self._app, self._limit_s = app, limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        deadline: float | None = None

        async def pieces(message: Message) -> None:
            nonlocal deadline
            deadline = deadline or asyncio.get_running_loop().time() + self._limit_s
            body, begin = message.get("body", b""), 0
            try:
                async with asyncio.timeout_at(deadline):
                    while len(body) - begin > PIECE_BYTES:
                        piece = body[begin : begin + PIECE_BYTES]
                        await send({"type": message["type"], "body": piece, "more_body": True})
                        begin += PIECE_BYTES
                    await send({**message, "body": body[begin:]} if begin else message)
            except TimeoutError:
                raise _NotReadError from None

        try:
            await self._app(scope, receive, pieces)
        except _NotReadError:  # the server closes the connection of an incomplete answer
            logger.info("A client did not read its answer within %g s", self._limit_s)
