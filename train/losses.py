"""Losses on (N, C, H, W) logits and masks, each class on its own: weighted sums of segmentation_models_pytorch's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from cloudrt.errors import DataError
from cloudrt.system.suggest import check_name

NAMES = ("bce", "dice", "iou", "focal", "lovasz")


class WeightedSum(nn.Module):
    """The weighted sum of several losses."""

    def __init__(self, parts: list[tuple[float, nn.Module]]) -> None:
        super().__init__()
        self.weights = [weight for weight, _ in parts]
        self.parts = nn.ModuleList(part for _, part in parts)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return a scalar."""
        terms = [weight * part(logits, target) for weight, part in zip(self.weights, self.parts, strict=True)]
        return torch.stack(terms).sum()


class PerSample(nn.Module):
    """The mean over the images of a loss that is computed for each alone: no image outweighs another.

    The mean over a batch is then that over its parts, which is what several processes average.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return a scalar."""
        one_by_one = zip(logits.chunk(len(logits)), target.chunk(len(target)), strict=True)
        return torch.stack([self.loss(one, truth) for one, truth in one_by_one]).mean()


def parse_loss(text: str) -> list[tuple[float, str]]:
    """Return weight and name of each term of "bce+dice" or "0.5*iou + dice + 2*focal".

    Raises
    ------
    DataError
        Another form, a weight that is not above 0, or a name that is not of `NAMES`; near ones are suggested.
    """
    terms = []
    for term in text.split("+"):
        weight, separator, name = term.rpartition("*")
        try:
            value = float(weight) if separator else 1.0
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise DataError(
                f"loss {text!r}: a term is NAME or WEIGHT*NAME, with a weight above 0, found {term.strip()!r}"
            )
        check_name("loss", name.strip(), list(NAMES))
        terms.append((value, name.strip()))
    return terms


def build_loss(text: str, over: str = "batch") -> nn.Module:
    """Return the loss of `parse_loss`'s form; over "samples" it is `PerSample`."""
    from segmentation_models_pytorch import losses

    mode = losses.MULTILABEL_MODE
    known: dict[str, Callable[[], nn.Module]] = {
        "bce": losses.SoftBCEWithLogitsLoss,
        "dice": lambda: losses.DiceLoss(mode),
        "iou": lambda: losses.JaccardLoss(mode),
        "focal": lambda: losses.FocalLoss(mode),
        "lovasz": lambda: losses.LovaszLoss(mode, per_image=True),
    }
    summed = WeightedSum([(weight, known[name]()) for weight, name in parse_loss(text)])
    return PerSample(summed) if over == "samples" else summed
