"""Connect to a cluster, run functions on its machines, divide it into workers, and report errors in one line."""

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
from cloudrt.options import CPU_PROVIDERS, GPU_PROVIDERS

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 5
"""Seconds to wait for a connection to the address of the cluster."""
TIMEOUT_S = 120
"""Seconds that a machine has to answer; starting its first process takes a while."""


class ClusterError(CloudrtError):
    """A cluster cannot be reached, its machines do not meet the requirements, or they fail again and again."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: its id and address, and the CPUs and GPUs that Ray may assign."""

    id: str
    address: str
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Share:
    """Division of the cluster: number of workers, and CPUs and GPUs of each."""

    workers: int
    cpus: int
    gpus: int


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to the cluster at `address`, or start Ray on this machine if it is "local"; disconnect at the end.

    An existing connection is used and kept.

    Raises
    ------
    ClusterError
        The address is malformed; no cluster answers there; it has another version of Ray or Python, or requires a
        token; or Ray does not start on this machine.
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
        with _silent_start():
            if address == "local":
                ray.init(address="local", include_dashboard=False, **quiet)
            else:
                ray.init(address=address, **quiet)
    except Exception as error:  # Ray raises Exception itself where a node does not start in time
        raise ClusterError(_refused(address, error)) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminated)  # Ray's handler prints a stack trace and exits with another status
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _silent_start() -> Iterator[None]:
    """Discard what is written to file descriptor 2, unless -v is given: Ray's C++ code prints its log level there."""
    if logger.isEnabledFor(logging.DEBUG):
        yield
        return
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def prepare() -> None:
    """Set the environment variables that Ray reads, unless the user has set them."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # errors are raised as exceptions
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; avoids a warning
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray lowers the priority of workers otherwise


def _reach(address: str) -> None:
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[\w.-]+):(\d{1,5})", address)
    if not match:
        raise ClusterError(f"--cluster {address}: expected HOST:PORT, such as 10.0.0.1:6379, or local, or auto")
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
    if address == "local":
        return f"Ray does not start on this machine: {text[:200]}"
    if address == "auto":
        return "no cluster runs on this machine: start one with ray start --head, or give --cluster without an address"
    if "ailed to connect" in text or "uthenticat" in text:
        return (
            f"the cluster at {address} requires a token, or is not a Ray cluster: give this machine the token that ray "
            "get-auth-token prints on the head node, and set RAY_AUTH_MODE=token here"
        )
    return f"the cluster at {address} cannot be used: {text[:200]}"


def list_nodes() -> list[Node]:
    """Return the machines of the cluster that are alive."""
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
    """Divide the cluster into workers.

    If there are GPUs and `provider` is no CPU provider, there is one worker per GPU, but no more than a machine's cores
    allow at `threads` cores each. Otherwise there is one worker per `threads` cores. If `threads` is 0, a GPU worker
    has the smallest number of cores per GPU of any machine with a GPU, and a CPU worker as many cores as the smallest
    machine.

    Raises
    ------
    ClusterError
        No machine has the CPUs or GPUs that a worker needs.
    """
    with_gpu = [node for node in nodes if node.gpus]
    if with_gpu and provider not in CPU_PROVIDERS:
        cpus = threads or max(1, min(node.cpus // node.gpus for node in with_gpu))
        workers = sum(min(node.gpus, node.cpus // cpus) for node in with_gpu)
        if not workers:
            if not any(node.cpus for node in with_gpu):
                raise ClusterError("no machine with a GPU offers CPUs: start Ray there with ray start --num-cpus")
            raise ClusterError(f"no machine with a GPU has {cpus} CPUs: give a smaller --threads")
        return Share(workers, cpus, 1)
    if provider in GPU_PROVIDERS:
        raise ClusterError(f"--provider {provider}: no machine of the cluster has a GPU according to Ray")
    sizes = [node.cpus for node in nodes if node.cpus]
    if not sizes:
        raise ClusterError("no machine of the cluster offers CPUs: start one with ray start --num-cpus")
    cpus = threads or min(sizes)
    workers = sum(size // cpus for size in sizes)
    if not workers:
        raise ClusterError(f"no machine of the cluster has {cpus} CPUs, the largest has {max(sizes)}: lower --threads")
    return Share(workers, cpus, 0)


def ask(nodes: Sequence[Node], question: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run a function on each machine and return the results.

    Raises
    ------
    ClusterError
        A machine does not answer in time, or the function raises an error there; names the machine.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def answer(*values: Any) -> Any:
        return question(*values)

    task = ray.remote(num_cpus=0, max_retries=1)(answer)
    sent = [ray.put(one) for one in arguments]  # once for all machines
    pending = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(*sent)
        for node in nodes
    ]
    answers = []
    for node, one in zip(nodes, pending, strict=True):
        try:
            answers.append(ray.get(one, timeout=TIMEOUT_S))
        except GetTimeoutError as error:
            raise ClusterError(f"machine {node.address} does not answer: remove it from the cluster") from error
        except RayError as error:
            raise unwrapped(error, f"machine {node.address}: ") from error
    return answers


def unwrapped(error: BaseException, where: str = "") -> ClusterError:
    """Return a ClusterError with the message of the cloudrt error inside an error of Ray, else its last line."""
    seen: BaseException | None = error
    while seen is not None:
        inner = getattr(seen, "cause", None)
        for one in (inner, seen):
            if isinstance(one, CloudrtError):
                text = next((part for part in one.args if isinstance(part, str)), str(one))
                if not text.startswith("\x1b"):  # the text of Ray's copy of the error is a coloured traceback
                    return ClusterError(f"{where}{_last_line(text)}")
        seen = inner if isinstance(inner, BaseException) and inner is not seen else seen.__cause__
    return ClusterError(f"{where}{_last_line(str(error))}")


def _last_line(text: str) -> str:
    """Return the message of the cloudrt error in a traceback, else the last line, without the name of the error."""
    ours = re.findall(r"^\s*(?:[\w.]+\()?cloudrt\.[\w.]*Error: (.+?)\s*$", text, re.MULTILINE)
    if ours:  # the line is not the last: Ray Data appends advice
        return str(ours[-1])
    text = re.split(r"^[\w.]*UserCodeException: ", text, flags=re.MULTILINE)[0]  # without Ray Data's advice
    raised = re.findall(r"^(?:\w+\.)*[A-Z]\w*(?:Error|Exception)(?:\([\w.]+\))?: (.+?)\s*$", text, re.MULTILINE)
    if raised:
        return str(raised[-1])
    last = ([line.strip() for line in text.splitlines() if line.strip()] or [""])[-1]
    return re.sub(r"^[\w.]*(Error|Exhausted)(\([\w.]+\))?: ", "", last)
