"""What a run optimises with: device, seeds, optimiser, schedule, average of the weights, mixed precision."""

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

from .config import TrainConfig
from .validate import Autocast

WARM_UP = {"one-cycle": 0.3, "cosine": 0.03}
"""The part of a run in which the rates rise."""
START, END = 1 / 25, 1e-4
"""Of the highest rate: where it begins, and where it ends."""


def seed_all(seed: int) -> None:
    """Seed every generator that weights, order and augmentation draw from."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries below draw from the global generator
    torch.manual_seed(seed)


def find_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device of that name; "auto" is CUDA when there, the GPU of this process among several.

    Raises
    ------
    DataError
        CUDA asked for where torch sees none, or no such device.
    """
    if name == "auto":
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise DataError("--device cuda: torch sees no CUDA device here; use --device cpu, or install torch with CUDA")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise DataError(f"no device named {name!r}: auto, cpu, cuda or cuda:1")
    return torch.device("cuda", local_rank) if device.type == "cuda" and device.index is None else device


def build_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimiser, with one group for the encoder and one for all the rest."""
    encoder = [p for name, p in network.named_parameters() if name.startswith("encoder.")]
    rest = [p for name, p in network.named_parameters() if not name.startswith("encoder.")]
    groups = [{"params": encoder, "lr": config.encoder_lr}, {"params": rest, "lr": config.decoder_lr}]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    return torch.optim.RAdam(groups, weight_decay=config.weight_decay)


class Schedule:
    """The learning rates over a run.

    "one-cycle" (L. Smith, N. Topin, "Super-convergence", 2018) and "cosine" follow the share of the run that is done,
    whether of its steps or of its time; "plateau" follows the held-out loss; "constant" follows nothing.
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
        """Set the rates for the share of the run, 0 to 1, that is done."""
        if self.kind not in WARM_UP:
            return
        for group, highest in zip(self._optimizer.param_groups, self._highest, strict=True):
            group["lr"] = highest * rate_factor(min(1.0, done), WARM_UP[self.kind])

    def report(self, loss: float) -> None:
        """Tell the held-out loss of an epoch."""
        if self._plateau:
            self._plateau.step(loss)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dict(self._plateau.state_dict()) if self._plateau else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        if self._plateau and state:
            self._plateau.load_state_dict(state)


def rate_factor(done: float, warm_up: float) -> float:
    """Return the rate as a share of the highest: half a cosine up, half a cosine down."""
    if done < warm_up:
        return _cosine(START, 1.0, done / warm_up)
    return _cosine(1.0, END, (done - warm_up) / (1 - warm_up))


def _cosine(begin: float, end: float, done: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * done)) / 2


def build_average(network: nn.Module, decay: float) -> AveragedModel | None:
    """Return the moving average of a network's weights and statistics, or None without a decay."""
    if not decay:
        return None
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(network, multi_avg_fn=average, use_buffers=True)


def build_autocast(precision: str, device: torch.device) -> tuple[Autocast, bool]:
    """Return the autocast context of a precision and whether its gradients must be scaled."""
    if precision == "auto":
        if device.type != "cuda":
            precision = "fp32"
        else:
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision == "fp32":
        return nullcontext, False
    if precision == "fp16" and device.type != "cuda":
        raise DataError("--precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return partial(torch.autocast, device.type, dtype), precision == "fp16"
