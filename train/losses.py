"""Losses on (N, C, H, W) logits and masks with independent classes: sums of segmentation_models_pytorch losses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import nn

from cloudrt.errors import DataError
from cloudrt.system.suggest import check_name

NAMES = ("bce", "dice", "iou", "focal", "lovasz")
OVERLAPS = ("dice", "iou", "lovasz")
"""Losses that measure the overlap of whole masks; the others are means over pixels."""
READ_SECONDS = 1.0
"""Interval at which `RunningLoss` reads losses from the device."""
SURELY_OFF = -30.0
"""A logit whose probability, about 1e-13, is negligible, and whose Lovasz error is zero."""


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
    """The mean over the images of a loss that is computed per image.

    The mean over a batch then equals the mean over its parts, as distributed training needs.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return a scalar."""
        one_by_one = zip(logits.chunk(len(logits)), target.chunk(len(target)), strict=True)
        return torch.stack([self.loss(one, truth) for one, truth in one_by_one]).mean()


class WherePresent(nn.Module):
    """The mean of an overlap loss over the pairs of image and class where the image has the class; 0 without any.

    All pairs are computed, and those without the class contribute 0, so that no shape depends on values on the device.

    Parameters
    ----------
    loss
        A loss that is 0 for an empty mask that is predicted empty.
    classes
        True if `loss` averages over classes: it gets the pairs as (1, N * C, H, W). False if it averages over images:
        it gets them as (N * C, 1, H, W).
    """

    def __init__(self, loss: nn.Module, classes: bool) -> None:
        super().__init__()
        self.loss, self.dim = loss, 0 if classes else 1

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return a scalar."""
        present = target.amax(dim=(2, 3), keepdim=True) > 0
        pairs = torch.where(present, logits, SURELY_OFF).flatten(0, 1).unsqueeze(self.dim)
        mean: torch.Tensor = self.loss(pairs, target.flatten(0, 1).unsqueeze(self.dim))
        return mean * (present.numel() / present.sum().clamp(min=1))


class RunningLoss:
    """The mean of the losses of an epoch, which are read from the device about once a second.

    Reading a loss waits until the device has finished all work; reading each one would leave a GPU idle between
    batches.
    """

    def __init__(self) -> None:
        self._unread: list[torch.Tensor] = []
        self._total, self._count = 0.0, 0
        self._read_at = -math.inf

    def add(self, loss: torch.Tensor) -> tuple[int, float] | None:
        """Add the loss of the next batch, and read the pending ones if it is time.

        Returns
        -------
        bad
            Number, from 1, and value of the first batch whose loss is not finite; None if there is none so far.
        """
        self._unread.append(loss.detach())
        return self.read() if time.monotonic() - self._read_at >= READ_SECONDS else None

    def read(self) -> tuple[int, float] | None:
        """Read all pending losses; see `add`."""
        values = torch.stack(self._unread).tolist() if self._unread else []
        self._unread.clear()
        self._read_at = time.monotonic()
        for value in values:
            self._count += 1
            if not math.isfinite(value):
                return self._count, value
            self._total += value
        return None

    @property
    def mean(self) -> float:
        """Mean of the losses read so far."""
        return self._total / max(1, self._count)


def parse_loss(text: str) -> list[tuple[float, str]]:
    """Return weight and name of each term of a sum such as "bce+dice" or "0.5*iou + dice + 2*focal".

    Raises
    ------
    DataError
        A malformed sum, a weight that is not positive, or a name that is not in `NAMES`.
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
                f"loss {text!r}: expected terms NAME or WEIGHT*NAME with a positive weight, found {term.strip()!r}"
            )
        check_name("loss", name.strip(), list(NAMES))
        terms.append((value, name.strip()))
    return terms


def build_loss(text: str, over: str = "batch", masks: str = "all") -> nn.Module:
    """Return the loss that `parse_loss` reads from `text`; see `TrainConfig` for `over` and `masks`."""
    from segmentation_models_pytorch import losses

    mode = losses.MULTILABEL_MODE
    known: dict[str, Callable[[], nn.Module]] = {
        "bce": losses.SoftBCEWithLogitsLoss,
        "dice": lambda: losses.DiceLoss(mode),
        "iou": lambda: losses.JaccardLoss(mode),
        "focal": lambda: losses.FocalLoss(mode),
        "lovasz": lambda: losses.LovaszLoss(mode, per_image=True),
    }
    terms = [(weight, name, known[name]()) for weight, name in parse_loss(text)]
    if masks == "present":
        terms = [
            (weight, name, WherePresent(loss, classes=name != "lovasz") if name in OVERLAPS else loss)
            for weight, name, loss in terms
        ]
    summed = WeightedSum([(weight, loss) for weight, _, loss in terms])
    return PerSample(summed) if over == "samples" else summed
