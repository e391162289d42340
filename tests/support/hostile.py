"""A server of models that sends broken or malicious responses, and the responses that it can send."""

from __future__ import annotations

import gzip
import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from cloudrt.engines.remote_metadata import model_parameters
from cloudrt.model.artifact import read_artifact

SIZE, BATCH, IMAGES = (64, 96), 2, 30
SHAPES = {"probability": [BATCH, 3, 90, 60], "presence": [BATCH, 3]}
SIZES = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}
Reply = Callable[[BaseHTTPRequestHandler], None]


def body(content: bytes, status: int = 200, **headers: str) -> Reply:
    """Return a reply with a body; `_` in the names of headers is "-"."""

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in ({"Content_Length": str(len(content))} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    return reply


def as_json(value: Any, status: int = 200) -> Reply:
    return body(json.dumps(value).encode(), status)


def tensors(change: Callable[[dict[str, Any]], object] = lambda _: None, extra: bytes = b"", **headers: str) -> Reply:
    """Return a reply with correct binary tensors, after a change of its JSON."""
    outputs = [
        {"name": name, "datatype": "UINT8", "shape": shape, "parameters": {"binary_data_size": SIZES[name]}}
        for name, shape in SHAPES.items()
    ]
    answer: dict[str, Any] = {"model_name": "tiny", "outputs": outputs}
    change(answer)
    header = json.dumps(answer).encode()
    length = {"Inference_Header_Content_Length": str(len(header))}
    return body(header + bytes(sum(SIZES.values())) + extra, 200, **(length | headers))


def raw(start: bytes, endless: bytes = b"", pause_s: float = 0.0) -> Reply:
    """Return a reply that sends `start`, and then `endless` until the client closes the connection."""

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.wfile.write(start)
        with suppress(OSError):
            while endless:
                handler.wfile.write(endless)
                time.sleep(pause_s)

    return reply


OK, CHUNK = b"HTTP/1.1 200 OK\r\n", b"10000\r\n" + bytes(1 << 16) + b"\r\n"
ANYWHERE: dict[str, tuple[Reply, str]] = {
    "list": (as_json([1]), "not a JSON object"),
    "text": (as_json("tiny"), "not a JSON object"),
    "number": (as_json(5), "not a JSON object"),
    "null": (as_json(None), "not a JSON object"),
    "no JSON": (body(b"<html>\n\n<b>hello</b>"), "not valid JSON"),
    "not UTF-8": (body(b'{"a": "\xff\xfe"}'), "not valid JSON"),
    "deep JSON": (body(b"[" * 200_000), "not valid JSON"),
    "long number": (body(b'{"a": ' + b"9" * 6_000 + b"}"), "not valid JSON"),
    "empty": (body(b""), "not valid JSON"),
    "redirect": (body(b"", 302, Location="http://192.0.2.1/"), "status 302: redirects to http://192.0.2.1/"),
    "gzip bomb": (body(gzip.compress(bytes(1 << 20)), Content_Encoding="gzip"), r"compressed \(gzip\)"),
    "huge": (raw(OK + b"Content-Length: 1000000000000\r\n\r\n"), "larger than the limit"),
    "endless": (raw(OK + b"\r\n", bytes(1 << 16)), "larger than the limit"),
    "endless chunks": (raw(OK + b"Transfer-Encoding: chunked\r\n\r\n", CHUNK), "larger than the limit"),
    "endless trailer": (
        raw(OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"A: " + b"b" * 8_000 + b"\r\n"),
        "larger than the limit",
    ),
    "endless interim": (raw(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1_000), "larger than the limit"),
    "endless line": (raw(b"", b"HTTP" * 10_000), "header line|status line"),
    "many headers": (raw(OK, b"A: b\r\n" * 1_000), "more than 100 headers"),
    "no HTTP": (raw(b"SSH-2.0-OpenSSH_9.2\r\n"), "not HTTP: SSH-2.0"),
    "bad chunk": (raw(OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n"), "IncompleteRead"),
    "refused": (body(b"\x1b[31m" + b"no " * 10_000, 403), "status 403: "),
    "refused without end": (raw(b"HTTP/1.1 403 No\r\n\r\n", bytes(1 << 16)), "status 403: "),
    "one byte at a time": (raw(OK + b"\r\n", b"{", 0.02), r"no complete response within 0.3 s"),
    "headers one byte at a time": (raw(OK, b"A", 0.02), r"no complete response within 0.3 s"),
    "cut headers": (raw(OK), "not valid JSON"),
    "cut body": (raw(OK + b"Content-Length: 9\r\n\r\n{"), "IncompleteRead"),
    "nothing": (raw(b""), "closed connection without response"),
}
"""Replies that are wrong for every request, and the words of the error."""

FIRST = "probability"
TENSORS: dict[str, tuple[Reply, str]] = {
    "no outputs": (as_json({"model_name": "tiny"}), "no list of outputs"),
    "outputs is a number": (tensors(lambda a: a.update(outputs=5)), "no list of outputs"),
    "outputs of texts": (tensors(lambda a: a.update(outputs=["probability"])), "no list of outputs"),
    "empty outputs": (as_json({"outputs": []}), "no output probability, presence"),
    "no presence": (tensors(lambda a: a["outputs"].pop()), "beyond its tensors"),
    "no name": (tensors(lambda a: a["outputs"][1].pop("name")), "no output presence"),
    "name is a list": (tensors(lambda a: a["outputs"][1].update(name=[])), "no output presence"),
    "parameters is a list": (
        tensors(lambda a: a["outputs"][0].update(parameters=[])),
        "expected 32400 integers, found 1 values",
    ),
    "no data": (tensors(lambda a: a["outputs"][0].pop("parameters")), "found 1 values of type NoneType"),
    "other dtype": (tensors(lambda a: a["outputs"][0].update(datatype="FP32")), "probability is 'FP32'"),
    "dtype is a list": (tensors(lambda a: a["outputs"][0].update(datatype=[])), r"probability is \[\]"),
    "other shape": (tensors(lambda a: a["outputs"][0].update(shape=[BATCH, 3, 60, 90])), r"\[2, 3, 60, 90\]"),
    "other batch": (tensors(lambda a: a["outputs"][0].update(shape=[1, 3, 90, 60])), r"\[1, 3, 90, 60\]"),
    "shape is a text": (tensors(lambda a: a["outputs"][0].update(shape="2")), "probability is 'UINT8' '2'"),
    "short size": (
        tensors(lambda a: a["outputs"][0]["parameters"].update(binary_data_size=SIZES[FIRST] - 1)),
        "expected 32400 of uint8|beyond its tensors",
    ),
    "no size": (
        tensors(lambda a: a["outputs"][0]["parameters"].update(binary_data_size=0)),
        "probability has 0 values of uint8",
    ),
    "long size": (
        tensors(lambda a: a["outputs"][0]["parameters"].update(binary_data_size=10**12)),
        "binary_data_size is 1000000000000",
    ),
    "negative size": (
        tensors(lambda a: a["outputs"][0]["parameters"].update(binary_data_size=-1)),
        "binary_data_size is -1",
    ),
    "size is a text": (
        tensors(lambda a: a["outputs"][0]["parameters"].update(binary_data_size="9")),
        "binary_data_size is '9'",
    ),
    "size is true": (
        tensors(lambda a: a["outputs"][0]["parameters"].update(binary_data_size=True)),
        "binary_data_size is True",
    ),
    "bytes at the end": (tensors(extra=b"x"), "1 bytes beyond its tensors"),
    "header is no number": (tensors(Inference_Header_Content_Length="x"), "Inference-Header-Content-Length is 'x'"),
    "header is too long": (tensors(Inference_Header_Content_Length="9" * 30), "Inference-Header-Content-Length"),
    "header is larger than the body": (tensors(Inference_Header_Content_Length="99999999"), "-Length is '99999999'"),
    **{
        f"data of {name}": (
            as_json({"outputs": [{"name": FIRST, "datatype": "UINT8", "shape": SHAPES[FIRST], "data": data}]}),
            "probability",
        )
        for name, data in {
            "text": "x" * SIZES[FIRST],
            "texts": ["1"] * SIZES[FIRST],
            "texts of different length": ["1" * 100_000, *"1" * (SIZES[FIRST] - 1)],
            "floats": [0.5] * SIZES[FIRST],
            "booleans": [True] * SIZES[FIRST],
            "large numbers": [256] * SIZES[FIRST],
            "very large numbers": [10**30] * SIZES[FIRST],
            "negative numbers": [-1] * SIZES[FIRST],
            "too few": [1],
            "uneven lists": [[1], [2, 3]],
            "objects": {"a": 1},
        }.items()
    },
}
"""Replies that are wrong for a request with a batch."""
AGAIN = {"bad chunk", "one byte at a time", "headers one byte at a time", "cut body", "nothing"}
"""Replies after which the batch is sent again, because the connection failed."""
IDLE = {"nothing"}
"""Replies that look as if the server had closed an idle connection: the request is repeated at once on a new one."""
LIMITS_S = {"one byte at a time": 0.3, "headers one byte at a time": 0.3}


class Hostile(ThreadingHTTPServer):
    """Serves the model "tiny" correctly, except for the paths in `replies`."""

    daemon_threads = True

    def __init__(self, model: Path) -> None:
        self.replies: dict[str, Reply] = {}
        self.asked = Counter[str]()
        outputs = [{"name": name, "datatype": "UINT8", "shape": [-1, *shape[1:]]} for name, shape in SHAPES.items()]
        metadata = {
            "inputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, *SIZE, 3]}],
            "outputs": outputs,
            "parameters": model_parameters(read_artifact(model), "0"),
        }
        self.usual = {
            "/v2": as_json({"extensions": ["binary_tensor_data"]}),
            "/v2/models/tiny": as_json(metadata),
            "/v2/models/tiny/config": as_json({"error": "not here"}, 404),
            "/v2/models/tiny/infer": tensors(),
        }
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore connections that the client closed."""


class Handler(BaseHTTPRequestHandler):
    server: Hostile
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each response takes 40 ms

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked[self.path] += 1
        (self.server.replies.get(self.path) or self.server.usual[self.path])(self)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass
