"""The command `cloudrt serve`, in a process of its own."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.server import ask
from support.tiny import SMALL_GRIDS, tiny_artifact, write_jpeg

from cloudrt.cli import main
from cloudrt.errors import DataError
from cloudrt.inference.pipeline import Segmenter
from cloudrt.serve.server import _announce
from cloudrt.serve.settings import ServeSettings


@contextmanager
def command(*words: str, environment: dict[str, str] | None = None) -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    """Run `cloudrt serve` on a free port; yields the process, its output and the port."""
    call = "from cloudrt.cli import main; main(prog_name='cloudrt')"
    line = [sys.executable, "-c", call, "serve", "--port", "0", "--provider", "cpu", *words]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=os.environ | (environment or {}))
    try:
        assert process.stderr
        said = ""
        while not (found := re.search(r"http://\S+:(\d+): .*\n", said)):
            read = process.stderr.readline()
            assert read, said
            said += read
        yield process, said, int(found[1])
    finally:
        process.kill()
        process.wait()
        if process.stderr:
            process.stderr.close()


def test_serves_on_loopback_until_sigterm(tmp_path: Path) -> None:
    model = tiny_artifact(tmp_path / "mine.onnx", (64, 96), SMALL_GRIDS)
    picture = write_jpeg(tmp_path / "0.jpg", 0).path.read_bytes()
    words = [str(model), "--batch-size", "2", "--threads", "2"]
    with command(*words, environment={"CLOUDRT_TOKEN": "hidden"}) as (process, said, port):
        assert "http://127.0.0.1:" in said and "this machine only" in said
        with ThreadPoolExecutor(4) as pool:
            token = {"Authorization": "Bearer hidden"}
            asked = [pool.submit(ask, port, "/v1/segment", picture, token) for _ in range(8)]
            assert [one.result().status for one in asked] == [200] * 8
        assert ask(port, "/v1/models").status == 401
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stderr and process.stderr.read().endswith("Stopped\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_an_upload_that_has_begun(tmp_path: Path, number: signal.Signals) -> None:
    model = tiny_artifact(tmp_path / "mine.onnx", (64, 96), SMALL_GRIDS)
    picture = write_jpeg(tmp_path / "0.jpg", 0).path.read_bytes()
    head = f"POST /v1/segment HTTP/1.1\r\nHost: x\r\nContent-Length: {len(picture)}\r\n\r\n".encode()
    with command(str(model), "--batch-size", "2", "--threads", "1") as (process, _, port):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            client.sendall(head + picture[:1000])
            while b"\ncloudrt_requests_in_progress 1.0" not in ask(port, "/metrics").body:
                time.sleep(0.05)
            process.send_signal(number)
            with suppress(ConnectionRefusedError):
                while True:
                    socket.create_connection(("127.0.0.1", port), timeout=60).close()
                    time.sleep(0.05)
            assert process.poll() is None
            client.sendall(picture[1000:])
            answer = b""
            while chunk := client.recv(1 << 16):
                answer += chunk
        assert answer.startswith(b"HTTP/1.1 200") and b'"error":null' in answer
        assert process.wait(60) == 0


def test_connections_without_requests_do_not_use_up_file_descriptors(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    model = tiny_artifact(tmp_path / "mine.onnx", (64, 96), SMALL_GRIDS)
    files, limits = 256, resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, limits[1]))
    try:
        starting = ExitStack()
        process, _, port = starting.enter_context(command(str(model), "--batch-size", "2", "--threads", "1"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with starting:
        with ExitStack() as stack:
            clients = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 60)) for _ in range(2 * files)]
            refused = 0
            while refused < 2 * files - files // 2:
                refused = len(select.select(clients, [], [], 60)[0])
                assert refused
            assert refused == 2 * files - files // 2
        while True:
            with suppress(ConnectionError):
                assert ask(port, "/readyz").status == 200
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stderr and process.stderr.read() == "Stopped\n"


def test_allow_origin(tmp_path: Path) -> None:
    """A browser sends a preflight request before a token, and reads an answer only if it allows the page's origin."""
    model = tiny_artifact(tmp_path / "mine.onnx", (64, 96), SMALL_GRIDS)
    words = [str(model), "--batch-size", "1", "--token", "hidden", "--allow-origin", "https://example.org"]
    with command(*words, "--allow-origin", "https://example.net") as (_, _, port):
        for origin, allowed in (("https://example.net", True), ("https://example.com", False)):
            connection = HTTPConnection("127.0.0.1", port, timeout=60)
            asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
            connection.request("OPTIONS", "/v1/segment", headers={"Origin": origin, **asked})
            answer = connection.getresponse()
            assert (answer.status == 200) == allowed
            assert answer.getheader("access-control-allow-origin") == (origin if allowed else None)
            connection.close()


def test_an_open_address_without_a_token_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_artifact(tmp_path / "mine.onnx", (64, 96), SMALL_GRIDS)
    caplog.set_level("INFO", "cloudrt")
    with Segmenter(model, provider="cpu", batch_size=1, threads=1) as segmenter:
        for host, token, warned in (("0.0.0.0", "", True), ("0.0.0.0", "hidden", False), ("127.0.0.1", "", False)):
            caplog.clear()
            _announce(segmenter, ServeSettings(host=host, token=token), 1234)
            assert f"http://{host}:1234: reachable from" in caplog.text
            assert ("everyone who can reach this address can use the server" in caplog.text) == warned


def test_what_cannot_be_served_gives_a_one_line_error(tmp_path: Path) -> None:
    bare = tiny_artifact(tmp_path / "bare.onnx", (64, 96), SMALL_GRIDS, rules=())
    sound = tiny_artifact(tmp_path / "sound.onnx", (64, 96), SMALL_GRIDS)
    for words, text in (
        ([tmp_path / "none.onnx"], "is missing"),
        ([bare, "--provider", "cpu", "--batch-size", "1"], "has no rules"),
        ([sound, "--decoder", "gpu"], "the server decodes on the CPU"),
        ([tmp_path / "none.onnx", "--host", "192.0.2.1", "--port", "81"], "cannot listen on 192.0.2.1:81"),
        ([sound, "--provider", "cpu", "--batch-size", "1", "--token", "two words"], "the token must consist of"),
        ([sound, "--name", "a/b"], "--name a/b: the name of a model in URLs cannot contain a slash"),
        ([sound, "--allow-origin", "foo"], "--allow-origin foo: expected an origin such as https://example.org"),
        ([sound, "--allow-origin", "https://example.org/"], "--allow-origin https://example.org/: expected an origin"),
    ):
        done = CliRunner().invoke(main, ["serve", "--port", "0", *map(str, words)])
        loading, *error = done.output.splitlines()
        assert (done.exit_code, loading, len(error)) == (2, "Loading libraries and the model ...", 1), done.output
        assert text in error[0]


def test_a_port_that_is_taken_is_reported_before_the_model_is_opened(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(main, ["serve", str(tmp_path / "none.onnx"), "--port", port])
    assert done.exit_code == 2 and f"cannot listen on 127.0.0.1:{port}" in done.output, done.output


def test_origins_of_browsers_are_accepted() -> None:
    ServeSettings(allow_origins=("*", "null", "http://localhost:3000", "http://[::1]:8080", "chrome-extension://abc"))


@pytest.mark.parametrize("wrong", [{"port": 70_000}, {"queue": 0}, {"delay_s": -1.0}, {"transfer_timeout_s": 0.0}])
def test_settings_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(DataError, match=next(iter(wrong))):
        ServeSettings(**wrong)  # type: ignore[arg-type]


def resident_bytes(process: int) -> int:
    """Return the resident memory of a process (proc(5))."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_five_minutes_of_overload_leave_memory_flat(tmp_path: Path) -> None:
    """32 clients without a pause, 8 slots: answers are 200 or 503; after a minute, memory grows by less than 50 MB."""
    model = tiny_artifact(tmp_path / "mine.onnx", (64, 96), SMALL_GRIDS)
    picture = write_jpeg(tmp_path / "0.jpg", 0, (1400, 2100)).path.read_bytes()
    words = [str(model), "--batch-size", "4", "--threads", "2", "--queue", "8"]
    with command(*words) as (process, _, port), ThreadPoolExecutor(32) as pool:
        end = time.monotonic() + 300

        def send_until_end() -> set[int]:
            statuses = set()
            while time.monotonic() < end:
                connection = HTTPConnection("127.0.0.1", port, timeout=60)
                with suppress(ConnectionResetError, BrokenPipeError):  # refused before the body was read
                    connection.request("POST", "/v1/segment", picture)
                    statuses.add(connection.getresponse().status)
                connection.close()
            return statuses

        clients = [pool.submit(send_until_end) for _ in range(32)]
        time.sleep(60)
        early = resident_bytes(process.pid)
        found = set[int]().union(*(client.result() for client in clients))
        assert found == {200, 503}
        assert resident_bytes(process.pid) < early + 50e6
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
