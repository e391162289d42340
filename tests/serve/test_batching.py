"""Requests share batches; the queue is bounded; a client that leaves frees its slot; accepted requests are finished."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.server import WAIT_S, Answer, Server, serving
from support.tiny import tiny_artifact, write_jpeg

from cloudrt.errors import MemoryExhausted
from cloudrt.inference.pipeline import Segmenter
from cloudrt.serve.settings import ServeSettings

BATCH = 4


class Valve:
    """Holds back the batches of a Segmenter until it is opened, and records their sizes."""

    def __init__(self, segmenter: Segmenter) -> None:
        self.sizes: list[int] = []
        self.begun, self.opened = threading.Event(), threading.Event()
        self._run = segmenter.pool.run
        self.fail: Exception | None = None

    def run(self, images: Any) -> Any:
        self.begun.set()
        assert self.opened.wait(WAIT_S)
        if self.fail:
            error, self.fail = self.fail, None
            raise error
        self.sizes.append(len(images))
        return self._run(images)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_jpeg(tmp_path_factory.mktemp("picture") / "0.jpg", 0).path.read_bytes()


@contextmanager
def held(model: Path, **settings: Any) -> Iterator[tuple[Server, Valve, Segmenter]]:
    """A server whose engine waits at a valve; the valve is opened at the end."""
    with Segmenter(model, provider="cpu", batch_size=BATCH, threads=2) as segmenter:
        valve = Valve(segmenter)
        with serving(segmenter, ServeSettings(**settings)) as server:
            segmenter.pool.run = valve.run  # type: ignore[method-assign]
            try:
                yield server, valve, segmenter
            finally:
                valve.opened.set()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def post(pool: ThreadPoolExecutor, server: Server, data: bytes, count: int) -> list[Future[Answer]]:
    return [pool.submit(server.ask, "/v1/segment", data) for _ in range(count)]


def test_concurrent_requests_share_batches(model: Path, picture: bytes) -> None:
    with held(model) as (server, valve, _), ThreadPoolExecutor(16) as pool:
        first = post(pool, server, picture, 1)
        assert valve.begun.wait(WAIT_S)
        others = post(pool, server, picture, 9)
        until(lambda: server.metric("cloudrt_queue_images") == 9)
        valve.opened.set()
        bodies = {one.result().body for one in first + others}
    assert valve.sizes == [1, 4, 4, 1]
    assert len(bodies) == 1


def test_the_images_of_a_request_fill_batches(model: Path) -> None:
    """Images in one request are split into batches of the engine."""
    with held(model) as (server, valve, _):
        valve.opened.set()
        for images in (BATCH, 6):
            head = {"name": "image", "datatype": "UINT8", "shape": [images, 64, 96, 3]}
            data = bytes(images * 64 * 96 * 3)
            text = json.dumps({"inputs": [head | {"parameters": {"binary_data_size": len(data)}}]}).encode()
            headers = {"Inference-Header-Content-Length": str(len(text))}
            assert server.ask("/v2/models/model/infer", text + data, headers).status == 200
    assert valve.sizes == [4, 4, 2]


def test_a_decoded_image_waits_no_longer_than_the_delay(model: Path, picture: bytes) -> None:
    """It is inferred after `delay_s`, although the decoding of another image hangs."""
    with held(model, delay_s=0.05) as (server, valve, segmenter), ThreadPoolExecutor(2) as pool:
        valve.opened.set()
        load, stuck, go_on = segmenter.decoding.load, threading.Event(), threading.Event()

        def slow(data: Any, out: Any) -> str | None:
            if data == b"slow":
                stuck.set()
                assert go_on.wait(WAIT_S)
            return load(data, out)

        segmenter.decoding.load = slow  # type: ignore[assignment, method-assign]
        late = pool.submit(server.ask, "/v1/segment", b"slow")
        assert stuck.wait(WAIT_S)
        try:
            assert server.ask("/v1/segment", picture).status == 200
            assert valve.sizes == [1] and not late.done()
        finally:
            go_on.set()
        assert late.result().status == 422


def test_a_full_queue_is_503_until_a_request_is_answered(model: Path, picture: bytes) -> None:
    with held(model, queue=3) as (server, valve, _), ThreadPoolExecutor(3) as pool:
        accepted = post(pool, server, picture, 3)
        until(lambda: server.metric("cloudrt_requests_in_progress") == 3)
        for path in ("/v1/segment", "/v2/models/model/infer"):
            answer = server.ask(path, picture)
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert "try again" in next(iter(answer.json.values()))
        assert server.ask("/healthz").status == 200
        valve.opened.set()
        assert [one.result().status for one in accepted] == [200] * 3
        assert server.ask("/v1/segment", picture).status == 200


def test_a_client_that_leaves_frees_its_slot(model: Path, picture: bytes) -> None:
    with held(model, queue=2) as (server, valve, _):
        head = f"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Length: {len(picture)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", server.port)) as running:
            running.sendall(head + picture)
            assert valve.begun.wait(WAIT_S)
            with socket.create_connection(("127.0.0.1", server.port)) as uploading:
                uploading.sendall(head + picture[:100])
                until(lambda: server.metric("cloudrt_requests_in_progress") == 2)
        until(lambda: server.metric("cloudrt_requests_in_progress") == 0)
        valve.opened.set()
        assert server.ask("/v1/segment", picture).status == 200


def test_a_body_that_does_not_arrive_is_408(model: Path) -> None:
    with held(model, transfer_timeout_s=0.1) as (server, _, _):
        with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as client:
            client.sendall(b"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n123")
            assert client.recv(100).startswith(b"HTTP/1.1 408")
        until(lambda: server.metric("cloudrt_requests_in_progress") == 0)


@pytest.mark.parametrize(
    "sent", [b"", b"GET /healthz HTTP/1.1\r\nHost:", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET"]
)
def test_a_connection_without_a_request_is_closed(model: Path, sent: bytes) -> None:
    with held(model, transfer_timeout_s=0.5) as (server, _, _):
        with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as client:
            client.sendall(sent)
            received = b""
            while chunk := client.recv(1000):
                received += chunk
        assert received.count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n")


@pytest.mark.parametrize("last", [b"", b"Connection: close\r\n"])
def test_a_connection_whose_complete_answer_is_not_read_is_closed(model: Path, picture: bytes, last: bytes) -> None:
    """The end of the answer is in the server's memory, because the network's buffers are full."""
    part = b'--b\r\nContent-Disposition: form-data; name="images"; filename="0.jpg"\r\n\r\n' + picture + b"\r\n"
    form = 10 * part + b"--b--\r\n"
    head = b"POST /v1/segment?levels=true HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    with held(model, transfer_timeout_s=0.5) as (server, valve, _), socket.socket() as client:
        valve.opened.set()
        connections = server.uvicorn.server_state.connections
        until(lambda: not connections)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        until(lambda: bool(connections))
        connection: Any = next(iter(connections))
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.sendall(head + last + b"Content-Length: %d\r\n\r\n" % len(form) + form)
        until(lambda: connection.cycle is not None and connection.cycle.response_complete)
        assert connection.transport.get_write_buffer_size() > 0
        until(lambda: not connections)


def test_a_request_in_progress_keeps_its_connection(model: Path, picture: bytes) -> None:
    with held(model, transfer_timeout_s=0.2) as (server, valve, _), ThreadPoolExecutor(1) as pool:
        (slow,) = post(pool, server, picture, 1)
        assert valve.begun.wait(WAIT_S)
        time.sleep(0.5)
        valve.opened.set()
        assert slow.result().status == 200


def test_a_client_that_does_not_read_holds_its_slot_for_a_limited_time(tmp_path: Path) -> None:
    images = 16
    body = bytes(images * 64 * 96 * 3)
    binary = {"binary_data_size": len(body)}
    tensor = {"name": "image", "datatype": "UINT8", "shape": [images, 64, 96, 3], "parameters": binary}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    path = tiny_artifact(tmp_path / "model.onnx")
    with held(path, queue=1, transfer_timeout_s=2) as (server, valve, segmenter):
        valve.opened.set()
        answer = server.ask("/v2/models/model/infer", head + body, headers)
        levels = segmenter.pool.run([np.zeros((64, 96, 3), np.uint8)])[0].tobytes()
        assert answer.body[int(answer.headers["inference-header-content-length"]) :] == images * levels
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(WAIT_S)
            client.connect(("127.0.0.1", server.port))
            lines = [b"POST /v2/models/model/infer HTTP/1.1", b"Host: x", b"Content-Length: %d" % len(head + body)]
            lines += [b"%s: %s" % (name.encode(), value.encode()) for name, value in headers.items()]
            client.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + head + body)
            assert client.recv(15) == b"HTTP/1.1 200 OK"
            assert server.ask("/v1/segment", b"").status == 503
            until(lambda: server.metric("cloudrt_requests_in_progress") == 0)
            until(lambda: not server.uvicorn.server_state.connections)  # that of the client is closed, too
            received = 0
            with suppress(ConnectionError):
                while found := client.recv(1 << 20):
                    received += len(found)
            assert received < images * len(levels)
        assert server.ask("/v1/segment", b"").status == 422


def test_a_stop_finishes_what_was_accepted(model: Path, picture: bytes) -> None:
    with held(model) as (server, valve, _), ThreadPoolExecutor(8) as pool:
        accepted = post(pool, server, picture, 6)
        until(lambda: server.metric("cloudrt_requests_in_progress") == 6)
        server.uvicorn.should_exit = True
        until(lambda: not server.uvicorn.servers[0].is_serving())
        assert not any(one.done() for one in accepted)
        valve.opened.set()
        assert [one.result().status for one in accepted] == [200] * 6


def test_batches_shrink_after_running_out_of_memory(model: Path, picture: bytes) -> None:
    with held(model) as (server, valve, segmenter), ThreadPoolExecutor(8) as pool:
        first = post(pool, server, picture, 1)
        assert valve.begun.wait(WAIT_S)
        valve.fail = MemoryExhausted("none left")
        others = post(pool, server, picture, 4)
        until(lambda: server.metric("cloudrt_queue_images") == 4)
        valve.opened.set()
        assert {one.result().status for one in first + others} == {200}
        assert segmenter.batch_size == BATCH // 2
    assert valve.sizes == [1, 2, 2]


def test_overload_is_refused_and_everything_accepted_is_answered(model: Path, picture: bytes) -> None:
    """Many more clients than slots: every answer is 200 or 503, and nothing is left behind."""
    with (
        Segmenter(model, provider="cpu", batch_size=BATCH, threads=2) as segmenter,
        serving(segmenter, ServeSettings(queue=4)) as server,
        ThreadPoolExecutor(24) as pool,
    ):
        answers = [one.result() for one in post(pool, server, picture, 240)]
        bodies = {one.body for one in answers if one.status == 200}
        assert {one.status for one in answers} <= {200, 503}
        assert len(bodies) == 1
        assert server.metric("cloudrt_requests_in_progress") == 0
        assert server.metric("cloudrt_queue_images") == 0
        done = sum(one.status == 200 for one in answers)
        assert server.metric("cloudrt_batch_images_sum") == done
