"""Broken or malicious servers: each response gives a one-line error that names the server.

Limits of size and time apply to every response.
"""

from __future__ import annotations

import re
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from support.hostile import (
    AGAIN,
    ANYWHERE,
    BATCH,
    IDLE,
    IMAGES,
    LIMITS_S,
    SHAPES,
    SIZE,
    SIZES,
    TENSORS,
    Hostile,
    Reply,
    as_json,
    raw,
    tensors,
)
from support.tiny import SMALL_GRIDS, tiny_artifact, write_jpeg

from cloudrt.cli import main
from cloudrt.engines import remote
from cloudrt.engines.remote import RemoteEngine, connect
from cloudrt.errors import ArtifactError, ProviderError
from cloudrt.masks.rule import Rule
from cloudrt.options import RemoteOptions


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


def is_one_line_with_url(text: str, url: str) -> bool:
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
    assert is_one_line_with_url(str(caught.value), hostile.url)
    assert hostile.asked[path] == 1 + (name in IDLE and path.endswith("config"))


@pytest.mark.parametrize("name", [*ANYWHERE, *TENSORS])
def test_the_response_to_a_batch(hostile: Hostile, name: str) -> None:
    reply, words = (ANYWHERE | TENSORS)[name]
    error = run(hostile, reply, timeout_s=LIMITS_S.get(name, 60))
    assert is_one_line_with_url(error, hostile.url)
    assert hostile.asked["/v2/models/tiny/infer"] == (2 if name in AGAIN else 1) + (name in IDLE), error
    assert re.search(words, error), error


@pytest.mark.parametrize("name", ["list", "no JSON", "gzip bomb", "endless", "redirect"])
def test_the_description_of_the_server(hostile: Hostile, name: str) -> None:
    reply, words = ANYWHERE[name]
    error = run(hostile, reply, "/v2")
    assert re.search(words, error), error


def test_a_server_that_is_too_busy_is_asked_again_whatever_it_sends(hostile: Hostile) -> None:
    error = run(hostile, raw(b"HTTP/1.1 503 Busy\r\n\r\n", bytes(1 << 16)))
    assert "the batch failed after 2 attempts" in error and is_one_line_with_url(error, hostile.url)
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


def test_a_run_stops_with_one_line_and_keeps_its_journal(hostile: Hostile, tmp_path: Path) -> None:
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
    assert is_one_line_with_url(str(caught.value), url)
