"""The cluster: connect to it, ask its machines, share it out among workers, and say in one line what went wrong."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cloudrt.errors import CloudrtError

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 5
PATIENCE = 120
"""Seconds that a machine has to answer; its first process takes a while to start."""


class ClusterError(CloudrtError):
    """A cluster that is not there, or whose machines are not what they must be."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: its id and address, and the CPUs and GPUs that Ray may give away."""

    id: str
    address: str
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Share:
    """How the cluster is shared out: so many workers, each of so many CPUs and GPUs."""

    workers: int
    cpus: int
    gpus: int


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to the cluster at `address`, or start Ray on this machine where it is "local"; leave it at the end.

    A connection that is there already is used, and kept.

    Raises
    ------
    ClusterError
        No cluster answers, or one of another version of Ray or Python.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    prepare()
    if address not in ("local", "auto"):
        _reach(address)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        if address == "local":
            ray.init(address="local", include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, OSError) as error:
        raise ClusterError(_refused(address, error)) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminated)  # Ray's own prints a stack and exits with another status
    try:
        yield
    finally:
        ray.shutdown()


def prepare() -> None:
    """Set what Ray reads from the environment, unless the user did."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # errors come as exceptions
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default, said aloud otherwise
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 otherwise: all else on the machine would come first


def _reach(address: str) -> None:
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[\w.-]+):(\d{1,5})", address)
    if not match:
        raise ClusterError(f"--cluster {address}: an address is HOST:PORT, such as 10.0.0.1:6379, or local, or auto")
    try:
        socket.create_connection((match[1].strip("[]"), int(match[2])), ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"no cluster answers at {address} ({getattr(error, 'strerror', None) or error}): start one there with "
            "ray start --head, or give --cluster without an address to use this machine"
        ) from error


def _refused(address: str, error: BaseException) -> str:
    text = " ".join(str(error).split())
    if "ersion mismatch" in text:
        found = re.search(r"started with:?(.*?)This process.*?with:?(.*?)(?:\.\s|$)", text)
        what = f": {found[1].strip(' .')} there, {found[2].strip(' .')} here" if found else ""
        return f"the cluster at {address} runs other versions of Ray or Python{what}: install the same on all machines"
    if address == "auto":
        return "no cluster runs on this machine: start one with ray start --head, or give --cluster without an address"
    if "ailed to connect" in text or "uthenticat" in text:
        return (
            f"the cluster at {address} lets nobody in without its token, or is no Ray: give this machine the token "
            "that ray get-auth-token prints on the head, and set RAY_AUTH_MODE=token here"
        )
    return f"the cluster at {address} cannot be used: {text[:200]}"


def list_nodes() -> list[Node]:
    """Return the machines that are there."""
    import ray

    return [
        Node(
            one["NodeID"],
            one["NodeManagerAddress"],
            int(one["Resources"].get("CPU", 0)),
            int(one["Resources"].get("GPU", 0)),
        )
        for one in ray.nodes()
        if one["Alive"]
    ]


def share_out(nodes: Sequence[Node], provider: str, threads: int) -> Share:
    """Return how many workers of how many cores: one a GPU where there are any and none of the CPU's providers is
    asked for, else one a group of `threads` cores, all of the smallest machine's by default.

    Raises
    ------
    ClusterError
        No machine has what a worker needs.
    """
    with_gpu = [node for node in nodes if node.gpus]
    if with_gpu and provider not in ("cpu", "openvino"):
        cpus = threads or max(1, min(node.cpus // node.gpus for node in with_gpu))
        workers = sum(min(node.gpus, node.cpus // cpus) for node in with_gpu)
        if not workers:
            raise ClusterError(f"no machine with a GPU has {cpus} CPUs for it: give a smaller --threads")
        return Share(workers, cpus, 1)
    if provider in ("cuda", "tensorrt"):
        raise ClusterError(f"--provider {provider}: no machine of the cluster has a GPU that Ray knows of")
    sizes = [node.cpus for node in nodes if node.cpus]
    if not sizes:
        raise ClusterError("no machine of the cluster has CPUs to give away: start some with ray start --num-cpus")
    cpus = threads or min(sizes)
    workers = sum(size // cpus for size in sizes)
    if not workers:
        raise ClusterError(f"no machine of the cluster has {cpus} CPUs, the largest {max(sizes)}: lower --threads")
    return Share(workers, cpus, 0)


def ask(nodes: Sequence[Node], question: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return each machine's answer to a function that is run there.

    Raises
    ------
    ClusterError
        A machine does not answer in time, or lacks what the function imports.
    CloudrtError
        What the function raises, its machine named.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def put(*values: Any) -> Any:
        return question(*values)

    task = ray.remote(num_cpus=0, max_retries=1)(put)
    sent = [ray.put(one) for one in arguments]  # once, however many machines there are
    pending = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(*sent)
        for node in nodes
    ]
    answers = []
    for node, one in zip(nodes, pending, strict=True):
        try:
            answers.append(ray.get(one, timeout=PATIENCE))
        except GetTimeoutError as error:
            raise ClusterError(f"machine {node.address} does not answer: take it out of the cluster") from error
        except RayError as error:
            raise unwrapped(error, f"machine {node.address}: ") from error
    return answers


def unwrapped(error: BaseException, where: str = "") -> CloudrtError:
    """Return what cloudrt raised inside of what Ray makes of it; else one line of the latter."""
    seen: BaseException | None = error
    while seen is not None:
        inner = getattr(seen, "cause", None)
        for one in (inner, seen):
            if isinstance(one, CloudrtError):
                text = next((part for part in one.args if isinstance(part, str)), str(one))
                if not text.startswith("\x1b"):
                    return ClusterError(f"{where}{_last_line(text)}")
        seen = inner if isinstance(inner, BaseException) and inner is not seen else seen.__cause__
    return ClusterError(f"{where}{_last_line(str(error))}")


def _last_line(text: str) -> str:
    """Return what cloudrt raised in a traceback as text, else what that ends with; without the name of the error."""
    ours = re.findall(r"^\s*(?:[\w.]+\()?cloudrt\.[\w.]*Error: (.+?)\s*$", text, re.MULTILINE)
    if ours:  # Ray Data puts advice of its own behind it
        return str(ours[-1])
    text = re.split(r"^[\w.]*UserCodeException: ", text, flags=re.MULTILINE)[0]  # there too
    raised = re.findall(r"^(?:\w+\.)*[A-Z]\w*(?:Error|Exception)(?:\([\w.]+\))?: (.+?)\s*$", text, re.MULTILINE)
    if raised:
        return str(raised[-1])
    last = ([line.strip() for line in text.splitlines() if line.strip()] or [""])[-1]
    return re.sub(r"^[\w.]*(Error|Exhausted)(\([\w.]+\))?: ", "", last)
