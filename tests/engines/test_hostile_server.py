"""Servers that are broken or malicious: each response is one error that names the server, within its limits."""

from __future__ import annotations

import gzip
import json
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from support.tiny import SMALL_GRIDS, tiny_artifact, write_jpeg

from cloudrt.cli import main
from cloudrt.engines import remote
from cloudrt.engines.remote import RemoteEngine, connect
from cloudrt.engines.remote_metadata import model_parameters
from cloudrt.errors import ArtifactError, ProviderError
from cloudrt.masks.postprocess import Rule
from cloudrt.model.artifact import read_artifact
from cloudrt.options import RemoteOptions

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

first = "probability"
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
        tensors(lambda a: a["outputs"][0]["parameters"].update(binary_data_size=SIZES[first] - 1)),
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
            as_json({"outputs": [{"name": first, "datatype": "UINT8", "shape": SHAPES[first], "data": data}]}),
            "probability",
        )
        for name, data in {
            "text": "x" * SIZES[first],
            "texts": ["1"] * SIZES[first],
            "texts of different length": ["1" * 100_000, *"1" * (SIZES[first] - 1)],
            "floats": [0.5] * SIZES[first],
            "booleans": [True] * SIZES[first],
            "large numbers": [256] * SIZES[first],
            "very large numbers": [10**30] * SIZES[first],
            "negative numbers": [-1] * SIZES[first],
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rules = (Rule(110, 40), Rule(120, 9), Rule(127, 0, presence=120))
    return tiny_artifact(
        tmp_path_factory.mktemp("hostile") / "tiny.onnx", SIZE, SMALL_GRIDS, presence=True, rules=rules
    )


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Hostile]:
    with Hostile(model) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def hostile(served: Hostile, monkeypatch: pytest.MonkeyPatch) -> Hostile:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    served.replies.clear()
    served.asked.clear()
    return served


def options(server: Hostile, attempts: int = 2, timeout_s: float = 60) -> RemoteOptions:
    return RemoteOptions((server.url,), "tiny", attempts=attempts, timeout_s=timeout_s)


def run(server: Hostile, reply: Reply, path: str = "/v2/models/tiny/infer", timeout_s: float = 60) -> str:
    """Return the error of a batch."""
    model = connect(options(server))
    server.replies[path] = reply
    model = replace(model, options=options(server, timeout_s=timeout_s))
    with RemoteEngine(model, BATCH) as engine, pytest.raises(ProviderError) as caught:
        engine.run(np.zeros((BATCH, *SIZE, 3), np.uint8))
    return str(caught.value)


def is_one_line(text: str, url: str) -> bool:
    return url in text and "\n" not in text and len(text) < 500


@pytest.mark.parametrize("name", ANYWHERE)
@pytest.mark.parametrize("path", ["/v2/models/tiny", "/v2/models/tiny/config"])
def test_the_description_of_a_model(hostile: Hostile, name: str, path: str) -> None:
    reply, words = ANYWHERE[name]
    hostile.replies[path] = reply
    asks = options(hostile, timeout_s=LIMITS_S.get(name, 60))
    if path.endswith("config") and words.startswith("status"):  # refused: the server has no such extension
        assert connect(asks).largest_batch == remote.BATCH_SIZE
        return
    with pytest.raises(ProviderError, match=words) as caught:
        connect(asks)
    assert is_one_line(str(caught.value), hostile.url)
    assert hostile.asked[path] == 1 + (name in IDLE and path.endswith("config"))


@pytest.mark.parametrize("name", [*ANYWHERE, *TENSORS])
def test_the_response_to_a_batch(hostile: Hostile, name: str) -> None:
    reply, words = (ANYWHERE | TENSORS)[name]
    error = run(hostile, reply, timeout_s=LIMITS_S.get(name, 60))
    assert is_one_line(error, hostile.url)
    assert hostile.asked["/v2/models/tiny/infer"] == (2 if name in AGAIN else 1) + (name in IDLE), error
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(error)


@pytest.mark.parametrize("name", ["list", "no JSON", "gzip bomb", "endless", "redirect"])
def test_the_description_of_the_server(hostile: Hostile, name: str) -> None:
    reply, words = ANYWHERE[name]
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(run(hostile, reply, "/v2"))


def test_a_server_that_is_too_busy_is_asked_again_whatever_it_sends(hostile: Hostile) -> None:
    error = run(hostile, raw(b"HTTP/1.1 503 Busy\r\n\r\n", bytes(1 << 16)))
    assert "no server has answered after 2 attempts" in error and is_one_line(error, hostile.url)
    assert hostile.asked["/v2/models/tiny/infer"] == 2


@pytest.mark.parametrize("size", [-1, 0.5, "many", 1e999, [1]])
def test_the_size_of_batches(hostile: Hostile, size: Any) -> None:
    hostile.replies["/v2/models/tiny/config"] = as_json({"max_batch_size": size})
    with pytest.raises(ArtifactError, match="malformed metadata"):
        connect(options(hostile))


def test_a_connection_that_the_server_closed_is_opened_again(hostile: Hostile) -> None:
    """Every response is the last one of its connection, but does not say so."""

    def closes(handler: BaseHTTPRequestHandler) -> None:
        tensors()(handler)
        handler.close_connection = True

    hostile.replies["/v2/models/tiny/infer"] = closes
    with RemoteEngine(connect(options(hostile, attempts=1)), BATCH) as engine:
        for _ in range(4):
            probability, presence = engine.run(np.zeros((BATCH, *SIZE, 3), np.uint8))
            assert presence is not None and [*probability.shape] == SHAPES["probability"]
            time.sleep(0.02)


def test_a_run_stops_with_one_line_and_keeps_its_journal(hostile: Hostile, model: Path, tmp_path: Path) -> None:
    for seed in range(IMAGES):
        write_jpeg(tmp_path / "in" / f"{seed:02}.jpg", seed)
    good, bad, count = tensors(), tensors(lambda a: a["outputs"][0].update(shape=5)), Counter[str]()

    def reply(handler: BaseHTTPRequestHandler) -> None:
        count["all"] += 1
        (good if count["all"] <= 10 else bad)(handler)

    hostile.replies["/v2/models/tiny/infer"] = reply
    words = ["infer", str(tmp_path / "in"), "-o", str(tmp_path / "s.csv"), "--batch-size", str(BATCH)]
    words += ["--remote", hostile.url, "--model", "tiny"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2, done.output
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert hostile.url in error and "output probability is 'UINT8' 5" in error
    assert (tmp_path / "s.csv.journal").exists() and not (tmp_path / "s.csv").exists()
    hostile.replies.clear()
    done = CliRunner().invoke(main, [*words, "--resume"])
    assert done.exit_code == 0 and "images are finished, continuing" in done.output, done.output
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 1 + IMAGES * 3


@contextmanager
def grpc_server(model: Path, change: Callable[[Any], object]) -> Iterator[str]:
    grpc = pytest.importorskip("grpc")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tritonclient.grpc import service_pb2 as messages
        from tritonclient.grpc import service_pb2_grpc as stubs

    class Servicer(stubs.GRPCInferenceServiceServicer):  # type: ignore[misc]
        asked = 0

        def ModelMetadata(self, request: Any, context: Any) -> Any:
            tensor = messages.ModelMetadataResponse.TensorMetadata
            image = tensor(name="image", datatype="UINT8", shape=[-1, *SIZE, 3])
            outputs = [tensor(name=name, datatype="UINT8", shape=[-1, *shape[1:]]) for name, shape in SHAPES.items()]
            return messages.ModelMetadataResponse(name="tiny", inputs=[image], outputs=outputs)

        def ModelInfer(self, request: Any, context: Any) -> Any:
            Servicer.asked += 1
            response = messages.ModelInferResponse(model_name="tiny")
            for name, shape in SHAPES.items():
                response.outputs.add(name=name, datatype="UINT8", shape=shape)
                response.raw_output_contents.append(bytes(SIZES[name]))
            change(response)
            return response

    server = grpc.server(ThreadPoolExecutor(2))
    stubs.add_GRPCInferenceServiceServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
        assert Servicer.asked == 1  # not sent again
    finally:
        server.stop(None).wait()


def first_bytes(response: Any, content: bytes) -> None:
    response.raw_output_contents[0] = content


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.outputs[0].ClearField("shape"), r"probability is 'UINT8' \[\]"),
        (lambda r: r.outputs[0].shape.append(-1), "probability is 'UINT8'"),
        (lambda r: setattr(r.outputs[0], "datatype", "BYTES"), "probability is 'BYTES'"),
        (lambda r: r.ClearField("outputs"), "no output probability, presence"),
        (lambda r: r.ClearField("raw_output_contents"), "output probability"),
        (lambda r: first_bytes(r, b"123"), "output probability"),
        (lambda r: first_bytes(r, bytes(10_000_000)), "larger than max"),
    ],
    ids=["no shape", "longer shape", "other dtype", "no outputs", "no contents", "few bytes", "many bytes"],
)
def test_grpc(model: Path, change: Callable[[Any], object], words: str) -> None:
    with grpc_server(model, change) as url:
        described = connect(RemoteOptions((url,), "tiny", rules=str(model), attempts=3))
        with RemoteEngine(described, BATCH) as engine, pytest.raises(ProviderError, match=words) as caught:
            engine.run(np.zeros((BATCH, *SIZE, 3), np.uint8))
    assert is_one_line(str(caught.value), url)
