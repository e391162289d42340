"""Several processes that train one network, started on this machine and watched: `torchrun` with one line at its end.

    python -m cloudrt.train.launch DATA --name NAME ...                       a process a GPU of this machine
    python -m cloudrt.train.launch --nodes 2 --head HOST:29500 DATA ...       the same command on each of two machines

The processes are those that torchrun starts, through PyTorch's own launcher; the first one of each machine is heard,
the others write to files. Where one ends, the others are ended too, and one line says which, how, and how to
go on: the state after the last whole epoch is in the run's folder.
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
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cloudrt.errors import DataError
from cloudrt.system.machine import usable_cpus
from cloudrt.system.terminal import reports_errors

TRAIN = (sys.executable, "-c", "from cloudrt.cli import train; train()")
JOIN_SECONDS = 900
"""How long machines wait for each other at the start."""


def launch(
    command: Sequence[str],
    processes: int,
    nodes: int = 1,
    head: str = "",
    run: str = "cloudrt",
    logs: Path | None = None,
) -> None:
    """Run a command in `processes` processes on this machine, of `nodes` machines that do the same.

    Parameters
    ----------
    command
        Program and arguments; each process finds its number in RANK, LOCAL_RANK and WORLD_SIZE.
    head
        HOST:PORT of one of the machines, for all to meet at; needed where they are several.
    run
        Name of the run, the same on all machines.
    logs
        Folder for what all processes but the first say; a temporary one where it is None.

    Raises
    ------
    DataError
        A process failed, or the machines did not meet. Names the process, and how to go on.
    """
    if nodes > 1 and not re.fullmatch(r".+:\d{1,5}", head):
        raise DataError(f"{nodes} machines need one to meet at: --head HOST:PORT, the same on all, found {head!r}")
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
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # what it says of a failure fills a page
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        raise DataError(_describe(error.failures, folder)) from error
    except (RendezvousError, TimeoutError, ConnectionError) as error:
        raise DataError(
            f"the {nodes} machines did not meet at {head}: start the same command on each, with a port "
            "that they all reach"
        ) from error


def _describe(failures: dict[int, ProcessFailure], folder: str) -> str:
    """Return which process failed first, how, what it said last, and what to do."""
    # Those that lose it end too, with a status of their own: a signal comes first.
    rank, first = min(failures.items(), key=lambda item: (item[1].exitcode >= 0, item[1].timestamp))
    how = f"status {first.exitcode}"
    if first.exitcode < 0:
        with suppress(ValueError):
            how = signal.Signals(-first.exitcode).name
    said = ""
    logs = sorted(Path(folder).rglob(f"{first.local_rank}/stderr.log")) if first.exitcode > 0 else []
    for path in logs:  # what one that was killed said last is not why
        lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
        said = f", saying {lines[-1]!r}" if lines else ""
    return (
        f"process {rank} of the training ended with {how}{said}; its others were ended too. The run's folder holds the "
        "state after the last whole epoch: the same command with --resume goes on from there"
    )


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--processes", type=click.IntRange(1), help="On this machine; one a GPU by default.")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="Machines that train together.")
@click.option("--head", default="", metavar="HOST:PORT", help="Where the machines meet: one of them, and a free port.")
@click.option("--run", default="cloudrt", show_default=True, help="Name that the machines know each other by.")
@click.option("--logs", type=click.Path(path_type=Path), help="Folder for what the other processes say.")
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED)
@reports_errors
def main(processes: int | None, nodes: int, head: str, run: str, logs: Path | None, arguments: tuple[str, ...]) -> None:
    """Start cloudrt-train with ARGUMENTS in several processes: DATA and its options, with a --name."""
    if "--name" not in arguments:
        raise DataError("give the run a --name: all processes write one folder, and --resume finds it there")
    launch([*TRAIN, *arguments], processes or _gpus(), nodes, head, run, logs)


def _gpus() -> int:
    """Return the GPUs of this machine.

    Raises
    ------
    DataError
        It has none.
    """
    import torch

    if not torch.cuda.is_available():
        raise DataError(f"no GPU here: say how many --processes share the {usable_cpus()} CPUs, and --device cpu")
    return torch.cuda.device_count()


if __name__ == "__main__":
    main()
