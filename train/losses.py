"""Losses on (N, C, H, W) logits and masks, each class on its own: those of segmentation_models_pytorch, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from segmentation_models_pytorch import losses
from torch import nn


class Sum(nn.Module):
    """The sum of several losses."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return a scalar."""
        return torch.stack([part(logits, target) for part in self.parts]).sum()


def build_loss(name: str) -> nn.Module:
    """Return the loss of that name; `TrainConfig` has checked it."""
    mode = losses.MULTILABEL_MODE
    known: dict[str, Callable[[], nn.Module]] = {
        "bce-dice": lambda: Sum(losses.SoftBCEWithLogitsLoss(), losses.DiceLoss(mode)),
        "bce": losses.SoftBCEWithLogitsLoss,
        "dice": lambda: losses.DiceLoss(mode),
        "focal": lambda: losses.FocalLoss(mode),
        "iou": lambda: losses.JaccardLoss(mode),
    }
    return known[name]()
