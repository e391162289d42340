"""Distributed training: the process group that `torchrun` starts, and its trivial form for a single process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed, nn

from cloudrt.errors import DataError

TIMEOUT_S = 7200.0
"""Time-out of collective operations. It is long because the other ranks wait while rank 0 validates."""


@dataclass(frozen=True)
class Processes:
    """Rank of this process in the process group.

    Parameters
    ----------
    rank, world_size
        Rank of this process and number of processes.
    local_rank
        Rank on this machine, which is also the index of the GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which validates and writes files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            distributed.barrier()

    def broadcast(self, value: float) -> float:
        """Return the value of rank 0."""
        if self.world_size == 1:
            return value
        shared = [value]
        distributed.broadcast_object_list(shared, src=0)
        return float(shared[0])

    def wrap(self, network: nn.Module, device: torch.device) -> nn.Module:
        """Return the network, wrapped to average gradients over the processes."""
        if self.world_size == 1:
            return network
        return nn.parallel.DistributedDataParallel(
            network, device_ids=[device.index] if device.type == "cuda" else None
        )


def is_distributed() -> bool:
    """Return whether `torchrun` or `cloudrt.train.launch` started several processes."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the process group that `torchrun` started; without one, yield a single process.

    Raises
    ------
    DataError
        torchrun's variables are incomplete or not whole numbers, there are more processes than GPUs, `device` is
        the GPU of another process, or another process ended.
    """
    if not is_distributed():
        yield Processes()
        return
    variables = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        found = Processes(*map(int, variables.values()))
    except ValueError as error:
        values = ", ".join(f"{name}={value}" for name, value in variables.items())
        raise DataError(f"expected whole numbers, found {values}: start several processes with torchrun") from error
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu and device.startswith("cuda:") and device != f"cuda:{found.local_rank}":
        raise DataError(f"--device {device} is one GPU, but each process needs its own: use --device cuda")
    if on_gpu and found.local_rank >= torch.cuda.device_count():
        raise DataError(f"local rank {found.local_rank} has no GPU: this machine has {torch.cuda.device_count()}")
    if on_gpu:
        torch.cuda.set_device(found.local_rank)
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=TIMEOUT_S))
    try:
        yield found
    except RuntimeError as error:
        text = str(error).lower()
        if not isinstance(error, distributed.DistError) and not any(sign in text for sign in _CONNECTION_ERRORS):
            raise
        raise DataError(
            f"process {found.rank} lost the connection to another process, which ended. The run folder holds the state "
            "after the last complete epoch: run the same command with --resume to continue"
        ) from error
    finally:
        distributed.destroy_process_group()


_CONNECTION_ERRORS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "socket timeout")
"""Parts of the messages of PyTorch's back-ends when another process ended."""
