"""Start the processes of a distributed training on this machine, as `torchrun` does, and report a failure in one line.

    python -m cloudrt.train.launch DATA --name NAME ...                       one process per GPU of this machine
    python -m cloudrt.train.launch --nodes 2 --head HOST:29500 DATA ...       the same command on each of two machines

PyTorch's own launcher starts the processes. Only local rank 0 logs to the terminal; the output of the others goes to
files. If a process fails, the launcher stops the others and reports its rank, its exit status and how to resume.
"""

from __future__ import annotations

import logging
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import click
import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cloudrt.errors import DataError
from cloudrt.system.machine import usable_cpus
from cloudrt.system.terminal import reports_errors

TRAIN = (sys.executable, "-c", "from cloudrt.cli import train; train()")
JOIN_SECONDS = 900
"""How long the machines wait for each other at the start."""


def launch(
    command: Sequence[str],
    processes: int,
    nodes: int = 1,
    head: str = "",
    run: str = "cloudrt",
    logs: Path | None = None,
) -> None:
    """Run a command in several processes on this machine, and on the other machines of the run.

    Parameters
    ----------
    command
        Program and arguments. Each process reads its rank from RANK, LOCAL_RANK and WORLD_SIZE.
    processes
        Number of processes on this machine.
    nodes
        Number of machines; each runs the same command.
    head
        HOST:PORT of the rendezvous, on one of the machines; required with several machines.
    run
        Name of the run, the same on all machines.
    logs
        Folder for the output of all processes but local rank 0. Default: a temporary folder.

    Raises
    ------
    DataError
        `head` is missing or malformed, a process failed, or the machines could not connect.
    SystemExit
        This process received SIGTERM, SIGINT or SIGHUP.
    """
    if nodes > 1 and not re.fullmatch(r".+:\d{1,5}", head):
        raise DataError(f"{nodes} machines need --head HOST:PORT, the same on all of them; found {head!r}")
    folder = str(logs or tempfile.mkdtemp(prefix="cloudrt-train-"))
    quiet = dict.fromkeys(range(1, processes), Std.ALL)
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=processes,
        run_id=run,
        max_restarts=0,
        rdzv_backend="c10d",
        rdzv_endpoint=head or "localhost:0",
        rdzv_configs={"join_timeout": JOIN_SECONDS},
        logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=quiet),
    )
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # its report is a page long
    try:
        elastic_launch(config, command[0])(*command[1:])
    except SignalException as stop:  # SIGTERM, SIGINT or SIGHUP; the processes have been stopped
        raise SystemExit(128 + stop.sigval) from None
    except ChildFailedError as error:
        raise DataError(_describe(error.failures, folder)) from error
    except (RendezvousError, TimeoutError, ConnectionError) as error:
        raise DataError(
            f"the {nodes} machines could not connect at {head}: run the same command on each, with a port that all "
            "of them can reach"
        ) from error


def _describe(failures: dict[int, ProcessFailure], folder: str) -> str:
    """Return the rank of the process that failed first, its exit status, its last message, and how to resume."""
    # When one process is killed by a signal, the others fail soon after, each with its own exit status.
    rank, first = min(failures.items(), key=lambda item: (item[1].exitcode >= 0, item[1].timestamp))
    how = f"status {first.exitcode}"
    if first.exitcode < 0:
        with suppress(ValueError):
            how = signal.Signals(-first.exitcode).name
    message = ""
    # The last line of a killed process is not the cause.
    logs = sorted(Path(folder).rglob(f"{first.local_rank}/stderr.log")) if first.exitcode > 0 else []
    for path in logs:
        lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
        message = f" and the message {lines[-1]!r}" if lines else ""
    return (
        f"process {rank} of the training ended with {how}{message}; the other processes were stopped. The run folder "
        "holds the state after the last complete epoch: run the same command with --resume to continue"
    )


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--processes", type=click.IntRange(1), help="Processes on this machine. Default: one per GPU.")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="Number of machines.")
@click.option("--head", default="", metavar="HOST:PORT", help="One of the machines, and a free port on it.")
@click.option("--run", default="cloudrt", show_default=True, help="Name of the run, the same on all machines.")
@click.option(
    "--logs",
    type=click.Path(path_type=Path),
    help="Folder for the output of all processes but local rank 0. Default: a temporary folder.",
)
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED)
@reports_errors
def main(processes: int | None, nodes: int, head: str, run: str, logs: Path | None, arguments: tuple[str, ...]) -> None:
    """Start cloudrt-train with ARGUMENTS (DATA and options, --name included) in several processes."""
    if not any(word.partition("=")[0] == "--name" for word in arguments):
        raise DataError("--name is required: all processes share the run folder")
    launch([*TRAIN, *arguments], processes or _gpus(), nodes, head, run, logs)


def _gpus() -> int:
    """Return the number of GPUs of this machine.

    Raises
    ------
    DataError
        There is none.
    """
    if not torch.cuda.is_available():
        raise DataError(f"no GPU found: give --processes to share the {usable_cpus()} CPUs, and --device cpu")
    return torch.cuda.device_count()


if __name__ == "__main__":
    main()
