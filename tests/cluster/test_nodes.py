"""Division of a cluster's nodes into workers, the start of Ray, nodes that are lost, and errors of one line."""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time

import pytest

from cloudrt.cluster import watch
from cloudrt.cluster.nodes import ClusterError, Node, Share, _silent_start, connected, share_out, unwrapped
from cloudrt.errors import DataError


def test_sharing_out() -> None:
    small, large, gpu, head = Node("a", "a", 4, 0), Node("b", "b", 16, 0), Node("c", "c", 32, 4), Node("d", "d", 0, 0)
    assert share_out([small, large, head], "auto", 0) == Share(5, 4, 0)
    assert share_out([small, large], "cpu", 8) == Share(2, 8, 0)
    assert share_out([small, gpu], "auto", 0) == Share(4, 8, 1)
    assert share_out([small, gpu], "openvino", 0) == Share(9, 4, 0)
    for nodes, provider, threads, named in (
        ([small], "cuda", 0, "no machine of the cluster has a GPU"),
        ([small], "cpu", 5, "has 5 CPUs, the largest has 4"),
        ([gpu], "auto", 64, "no machine with a GPU has 64 CPUs"),
        ([Node("e", "e", 0, 1), small], "auto", 0, "no machine with a GPU offers CPUs: start Ray there"),
        ([head], "auto", 0, "offers CPUs"),
    ):
        with pytest.raises(ClusterError, match=named):
            share_out(nodes, provider, threads)


def test_errors_are_one_line() -> None:
    outer = RuntimeError("ray::Worker() (pid=1)\n  File x\ncloudrt.errors.DataError: what is wrong")
    assert str(unwrapped(outer)) == "what is wrong"
    advised = RuntimeError(f"{outer}\n\nTo change retry attempts, configure `ray.data.DataContext.get_current()`.")
    assert str(unwrapped(advised)) == "what is wrong"
    lines = "ray.exceptions.ActorDiedError: It died.\n\tpid: 1\nThe actor is dead: memory\n"
    lines += "\nray.UserCodeException: UDF failed.\nTo change retry attempts, configure it."
    assert str(unwrapped(RuntimeError(lines))) == "It died."
    outer.__cause__ = DataError("what is wrong inside")
    assert str(unwrapped(outer, "machine a: ")) == "machine a: what is wrong inside"


def test_a_ray_that_does_not_start_gives_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an overloaded machine, Ray raises a plain Exception."""
    ray = pytest.importorskip("ray")

    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nThis could happen")

    monkeypatch.setattr(ray, "init", init)
    said = r"^Ray does not start on this machine: The current node .* This could"
    with pytest.raises(ClusterError, match=said), connected("local"):
        pass


def test_only_a_long_silence_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A local server that stops for less, then for more, than the time limit."""
    monkeypatch.setattr(watch, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(watch, "GRACE", {"the head": 1.0})
    said: queue.Queue[str] = queue.Queue()
    server = socket.create_server(("127.0.0.1", 0))
    address = server.getsockname()
    looking = threading.Thread(target=watch.look, args=({"the head": address}, said.put, threading.Event()))
    looking.start()
    server.close()
    time.sleep(0.4)
    server = socket.create_server(address)
    time.sleep(0.8)
    assert said.empty()
    server.close()
    assert (
        said.get(timeout=5)
        == f"the head, 127.0.0.1:{address[1]}, does not answer: start it again, then continue with --resume"
    )
    looking.join(5)
    assert not looking.is_alive()


@pytest.mark.parametrize("verbose", [False, True])
def test_what_ray_prints_while_it_starts_is_shown_with_v_only(
    verbose: bool, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG if verbose else logging.INFO, "cloudrt")
    with _silent_start():
        os.write(2, b"Set ray log level\n")
    os.write(2, b"after\n")
    assert capfd.readouterr().err.splitlines() == ["Set ray log level", "after"][0 if verbose else 1 :]
