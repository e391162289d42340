"""Several processes that train one network: what `torchrun` starts, and what a single process need not know."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed, nn

from cloudrt.errors import DataError

PATIENCE = timedelta(hours=2)
"""How long a process waits for the others: the first one validates alone."""


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Parameters
    ----------
    rank, world
        Its number, and how many there are.
    local_rank
        Its number on this machine: that of its GPU.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the one that validates and writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all are here."""
        if self.world > 1:
            distributed.barrier()

    def share(self, value: float) -> float:
        """Return the first process's value."""
        if self.world == 1:
            return value
        shared = [value]
        distributed.broadcast_object_list(shared, src=0)
        return float(shared[0])

    def wrap(self, network: nn.Module, device: torch.device) -> nn.Module:
        """Return the network whose gradients are averaged over the processes."""
        if self.world == 1:
            return network
        return nn.parallel.DistributedDataParallel(
            network, device_ids=[device.index] if device.type == "cuda" else None
        )


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the processes that `torchrun` started, or be the only one.

    Raises
    ------
    DataError
        torchrun's variables are incomplete; more processes than GPUs; another process ended in the middle.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    try:
        found = Processes(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    except (KeyError, ValueError) as error:
        raise DataError(f"WORLD_SIZE is set, and {error} is not: start several processes with torchrun") from error
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu and found.local_rank >= torch.cuda.device_count():
        raise DataError(f"process {found.local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}")
    if on_gpu:
        torch.cuda.set_device(found.local_rank)
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield found
    except RuntimeError as error:
        text = str(error).lower()
        if not isinstance(error, distributed.DistError) and not any(sign in text for sign in _ALONE):
            raise
        raise DataError(
            f"process {found.rank} lost the others: one of them ended, or its machine. The run's folder holds the "
            "state after the last whole epoch: the same command with --resume goes on from there"
        ) from error
    finally:
        distributed.destroy_process_group()


_ALONE = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "socket timeout")
"""How PyTorch's back-ends say that another process is gone."""
