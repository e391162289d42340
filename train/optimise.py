"""Device, seeds, data-loading processes, optimiser, learning-rate schedule, weight average, and mixed precision."""

from __future__ import annotations

import math
import random
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cloudrt.errors import DataError
from cloudrt.system.machine import describe_machine, usable_cpus

from .config import TrainConfig
from .validate import Autocast

WARM_UP = {"one-cycle": 0.3, "cosine": 0.03}
"""Fraction of the run in which the learning rates rise."""
START, END = 1 / 25, 1e-4
"""First and last learning rate, as fractions of the highest."""
BF16_FEATURES = {"avx512_bf16", "amx_bf16"}
"""CPU features with which bf16 is faster than fp32."""


def seed_all(seed: int) -> None:
    """Seed the random generators of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - other libraries use the global generator
    torch.manual_seed(seed)


def find_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device of that name; "auto" is CUDA if available. `local_rank` is the index of the GPU.

    Raises
    ------
    DataError
        There is no such device.
    """
    if name == "auto":
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise DataError("--device cuda: PyTorch finds no CUDA device; use --device cpu, or install PyTorch with CUDA")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise DataError(f"no device named {name!r}: use auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DataError(f"no device {name}: PyTorch finds {torch.cuda.device_count()} GPUs, counted from 0")
    return torch.device("cuda", local_rank) if device.type == "cuda" and device.index is None else device


def default_workers(device: str) -> int:
    """Return the number of data-loading processes: 0 on a CPU, where they would take cores from the network."""
    return min(8, usable_cpus() - 1) if device != "cpu" and torch.cuda.is_available() else 0


def build_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimiser, with two parameter groups: the encoder, and all other parameters."""
    encoder = [p for name, p in network.named_parameters() if name.startswith("encoder.")]
    rest = [p for name, p in network.named_parameters() if not name.startswith("encoder.")]
    groups = [{"params": encoder, "lr": config.encoder_lr}, {"params": rest, "lr": config.decoder_lr}]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    return torch.optim.RAdam(groups, weight_decay=config.weight_decay)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore the state of an optimiser of `build_optimizer`; PyTorch checks only the number of parameters.

    Raises
    ------
    Exception
        `TypeError` for options and averages of other types or shapes, or an exception of PyTorch.
    """
    for own, found in zip(optimizer.state_dict()["param_groups"], state["param_groups"], strict=True):
        _check_types(own, found)
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found = optimizer.state.get(parameter)
            if not found:  # before the first step
                continue
            shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}  # of RAdam and AdamW
            if any(not isinstance(value, torch.Tensor) for value in found.values()) or shapes != {
                name: value.shape for name, value in found.items()
            }:
                raise TypeError(f"the state of a parameter of shape {tuple(parameter.shape)} is of another optimiser")


def _check_types(own: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise TypeError if a value of `found` is of another type than in `own`; all numbers are one type."""
    for name in own.keys() & found.keys():
        numbers = all(isinstance(values[name], int | float) for values in (own, found))
        if not numbers and type(own[name]) is not type(found[name]):
            raise TypeError(f"{name} is {found[name]!r}, expected a value such as {own[name]!r}")


class Schedule:
    """The learning-rate schedule.

    "one-cycle" (L. Smith, N. Topin, "Super-convergence", 2018) and "cosine" depend on the completed fraction of the
    run, of its steps or of its time budget; "plateau" depends on the held-out loss.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
        self.kind = config.schedule
        self._optimizer = optimizer
        self._highest = [config.encoder_lr, config.decoder_lr]
        self._plateau = (
            torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=5)
            if self.kind == "plateau"
            else None
        )
        self.progress(0.0)

    def progress(self, done: float) -> None:
        """Set the learning rates for the completed fraction of the run, 0 to 1."""
        if self.kind not in WARM_UP:
            return
        for group, highest in zip(self._optimizer.param_groups, self._highest, strict=True):
            group["lr"] = highest * rate_factor(min(1.0, done), WARM_UP[self.kind])

    def report(self, loss: float) -> None:
        """Update the plateau schedule with the held-out loss of an epoch."""
        if self._plateau:
            self._plateau.step(loss)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return dict(self._plateau.state_dict()) if self._plateau else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state; raises TypeError for values of other types."""
        if self._plateau and state:
            own = self._plateau.state_dict()
            _check_types(own, state)
            self._plateau.load_state_dict({name: state[name] for name in own if name in state})


def rate_factor(done: float, warm_up: float) -> float:
    """Return the learning rate as a fraction of the highest: half a cosine up, half a cosine down."""
    if done < warm_up:
        return _cosine(START, 1.0, done / warm_up)
    return _cosine(1.0, END, (done - warm_up) / (1 - warm_up))


def _cosine(begin: float, end: float, done: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * done)) / 2


def build_average(network: nn.Module, decay: float) -> AveragedModel | None:
    """Return the exponential moving average of parameters and buffers; None if `decay` is 0."""
    if not decay:
        return None
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(network, multi_avg_fn=average, use_buffers=True)


def find_precision(precision: str, device: torch.device) -> str:
    """Return the precision of that name; "auto" is bf16 if the device has instructions for it, else fp16 or fp32.

    Raises
    ------
    DataError
        fp16 on a CPU.
    """
    on_gpu = device.type == "cuda"
    if precision == "fp16" and not on_gpu:
        raise DataError("--precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    if precision != "auto":
        return precision
    if on_gpu:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if BF16_FEATURES & set(describe_machine().features) else "fp32"


def build_autocast(precision: str, device: torch.device) -> tuple[Autocast, bool]:
    """Return the autocast context of a precision, and whether to scale gradients; see `find_precision`."""
    precision = find_precision(precision, device)
    if precision == "fp32":
        return nullcontext, False
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return partial(torch.autocast, device.type, dtype), precision == "fp16"
