"""Self-supervised pre-training on brightness, for encoders without ImageNet weights.

Random blocks of the image are hidden. For each class, the network predicts which pixels of the whole image exceed a
quantile of its brightness, and so learns from the context what clouds look like. Encoder and decoder are kept; the
segmentation head is reset to its initial weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from cloudrt.errors import DataError

from .config import TrainConfig
from .dataset import CloudDataset, EpochBatches, Feed
from .losses import RunningLoss
from .optimise import build_autocast, build_optimizer, rate_factor

logger = logging.getLogger(__name__)

BLOCK = 32
"""Side of a hidden block, in pixels."""
HIDDEN = 0.5
"""Fraction of hidden blocks."""
SMOOTH = 9
"""Side of the mean filter on the brightness, which removes texture."""


def pretrain(
    network: nn.Module, dataset: CloudDataset, config: TrainConfig, device: torch.device, advance: Callable[..., object]
) -> None:
    """Train the network for `config.pretrain_epochs` epochs on brightness, then reset its segmentation head.

    Raises
    ------
    DataError
        A loss that is not finite.
    """
    initial = [value.detach().clone() for value in _head(network).parameters()]
    batches = EpochBatches(len(dataset), config.batch_size, config.seed)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=config.workers)
    optimizer = build_optimizer(network, config)
    highest = [group["lr"] for group in optimizer.param_groups]
    autocast, _ = build_autocast("fp32" if config.precision == "fp16" else config.precision, device)
    random = torch.Generator().manual_seed(config.seed)
    feed = Feed(dataset.config, device)
    network.train()
    steps, total = 0, config.pretrain_epochs * len(batches)
    losses = RunningLoss()
    for epoch in range(config.pretrain_epochs):
        dataset.epoch = batches.epoch = 1_000_000 + epoch  # different augmentations from those of training
        for image, mask, *_ in loader:
            for group, rate in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = rate * rate_factor(steps / total, 0.1)
            pixels, truth = feed(image, mask)
            target = brightness(pixels, truth.shape[1])
            with autocast():
                found = network(hide(pixels, random))
            logits = found[0] if isinstance(found, tuple) else found
            loss = functional.binary_cross_entropy_with_logits(logits.float(), target)
            _check(losses.add(loss))
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            steps += 1
            advance(len(image), loss=losses.mean)
    _check(losses.read())
    with torch.no_grad():
        for value, first in zip(_head(network).parameters(), initial, strict=True):
            value.copy_(first)


def _check(bad: tuple[int, float] | None) -> None:
    if bad:
        raise DataError(f"the loss of pre-training is {bad[1]} at batch {bad[0]}: lower the learning rates")


def brightness(pixels: torch.Tensor, classes: int) -> torch.Tensor:
    """Return where the smoothed brightness of (N, 3, H, W) images exceeds its quantiles k / (C + 1), k = 1..C.

    The result is (N, C, H, W) float32, 0 or 1.
    """
    grey = functional.avg_pool2d(pixels.mean(dim=1, keepdim=True), SMOOTH, stride=1, padding=SMOOTH // 2)
    flat = grey.flatten(1)
    shares = torch.arange(1, classes + 1, device=pixels.device, dtype=flat.dtype) / (classes + 1)
    cuts = torch.quantile(flat[:, :: max(1, flat.shape[1] // 20_000)], shares, dim=1).T
    return (grey > cuts[:, :, None, None]).float()


def hide(pixels: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Return (N, 3, H, W) normalised images with about half of their blocks set to 0, the mean."""
    images, _, height, width = pixels.shape
    rows, columns = -(-height // BLOCK), -(-width // BLOCK)
    shown = (torch.rand((images, 1, rows, columns), generator=random) >= HIDDEN).to(pixels.device, pixels.dtype)
    whole = shown.repeat_interleave(BLOCK, dim=2).repeat_interleave(BLOCK, dim=3)
    return pixels * whole[:, :, :height, :width]


def _head(network: nn.Module) -> nn.Module:
    head = getattr(network, "segmentation_head", network)
    assert isinstance(head, nn.Module)
    return head
