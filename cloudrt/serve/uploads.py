"""Reading the body of a request: one image, or several as multipart/form-data, within limits of bytes and time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from cloudrt.serve.settings import ServeSettings

R = TypeVar("R")

MAX_FILES = 256
"""Largest number of images in one request."""
STRIPPED = "the image has lost its zero bytes, as with curl -d @FILE: use curl --data-binary @FILE, or -F images=@FILE"
"""`curl -d` removes zero bytes and line breaks; every image has zero bytes."""
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"II*", b"MM*", b"RIFF", b"BM")


async def read_body(request: Request, settings: ServeSettings) -> bytes:
    """Return the body of a request.

    Raises
    ------
    HTTPException
        413, too large; 408, too slow.
    """
    chunks = [chunk async for chunk in _limited(request, settings)]
    return b"".join(chunks)


async def read_images(request: Request, settings: ServeSettings) -> list[tuple[str, bytes]]:
    """Return the name and the bytes of each image of a request.

    The files of multipart/form-data have names of their own; any other body is one image, "image-0".

    Raises
    ------
    HTTPException
        See `read_body`; 422, an image without its zero bytes; 400, malformed multipart data, no file in it, or
        a part that is not a file.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        body = await read_body(request, settings)
        if body.startswith(_MAGIC) and b"\0" not in body:
            raise HTTPException(422, STRIPPED)
        return [("image-0", body)]
    stream = _limited(request, settings)
    parser = _Parser(request.headers, stream, max_files=MAX_FILES, max_fields=MAX_FILES)
    parser.stream = parser.whole(stream)
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError) as error:  # ValueError: a header that is not text
        raise HTTPException(400, f"malformed multipart/form-data: {getattr(error, 'message', error)}") from error
    try:
        parts = form.multi_items()
        files = [value for _, value in parts if isinstance(value, UploadFile)]
        if not files or len(files) < len(parts):
            found = "a part without a file name" if parts else "no file"
            raise HTTPException(400, f"{found} in the form: send each image as a part with a file name")
        names = [(file.filename or "").encode(errors="replace").decode() for file in files]  # no lone surrogates
        return [
            (name or f"image-{i}", await file.read()) for i, (name, file) in enumerate(zip(names, files, strict=True))
        ]
    finally:
        await form.close()


class _Parser(MultiPartParser):
    """Refuses a form without its last boundary; starlette would ignore the file that is cut off."""

    spool_max_size = 0  # never write images to a temporary file
    ended = False

    def on_end(self) -> None:
        self.ended = True

    async def whole(self, stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """Yield the chunks of a form; each is parsed before the next one is read."""
        async for chunk in stream:
            yield chunk
        if not self.ended:
            raise MultiPartException("it is cut off")


async def unless_gone(request: Request, work: Coroutine[Any, Any, R]) -> R:
    """Return the result of `work`, which is cancelled if the client disconnects; call it after reading the body.

    Raises
    ------
    ClientDisconnect
        The client has disconnected.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, gone):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _limited(request: Request, settings: ServeSettings) -> AsyncGenerator[bytes, None]:
    """Yield the chunks of a body, which must not exceed the limits."""
    most, size = settings.max_upload_bytes, 0
    too_large = HTTPException(413, f"the request is larger than {most:,} bytes", {"Connection": "close"})
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > most:
        raise too_large
    chunks = request.stream().__aiter__()
    deadline = asyncio.get_running_loop().time() + settings.transfer_timeout_s
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError:
            message = f"the body did not arrive within {settings.transfer_timeout_s:g} s"
            raise HTTPException(408, message, {"Connection": "close"}) from None
        size += len(chunk)
        if size > most:
            raise too_large
        yield chunk
