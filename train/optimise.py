"""What a run optimises with: device, seeds, optimiser, schedule, mixed precision."""

from __future__ import annotations

import random
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch import nn

from cloudrt.errors import DataError

from .config import TrainConfig
from .validate import Autocast


def seed_all(seed: int) -> None:
    """Seed every generator that weights, order and augmentation draw from."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries below draw from the global generator
    torch.manual_seed(seed)


def find_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is CUDA when there.

    Raises
    ------
    DataError
        CUDA asked for where torch sees none, or no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise DataError("--device cuda: torch sees no CUDA device here; use --device cpu, or install torch with CUDA")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise DataError(f"no device named {name!r}: auto, cpu, cuda or cuda:1") from error


def build_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimiser, with one group for the encoder and one for all the rest."""
    encoder = [p for name, p in network.named_parameters() if name.startswith("encoder.")]
    rest = [p for name, p in network.named_parameters() if not name.startswith("encoder.")]
    groups = [{"params": encoder, "lr": config.encoder_lr}, {"params": rest, "lr": config.decoder_lr}]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    return torch.optim.RAdam(groups, weight_decay=config.weight_decay)


def build_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """Return the schedule: "plateau" steps each epoch, "one-cycle" each optimiser step, "constant" is None."""
    if config.schedule == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=5)
    if config.schedule == "one-cycle":
        highest = [config.encoder_lr, config.decoder_lr]
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, total_steps=max(2, config.epochs * steps))
    return None


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
