"""Pre-training without labels: where is a scene bright? What ImageNet weights are for, where they cannot be had.

Blocks of the image are hidden, and the network predicts, for each of its classes, which pixels of the whole image
exceed one of its own brightness quantiles: it learns what clouds look like in their surroundings. The head that says
so is made anew for training; encoder and decoder stay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from .config import TrainConfig
from .dataset import CloudDataset, EpochBatches, Feed
from .optimise import build_autocast, build_optimizer, rate_factor

logger = logging.getLogger(__name__)

BLOCK = 32
"""Sides of a hidden block, pixels."""
HIDDEN = 0.5
"""Share of the blocks."""
SMOOTH = 9
"""Sides of the mean that is taken of the brightness: texture is noise here."""


def pretrain(
    network: nn.Module, dataset: CloudDataset, config: TrainConfig, device: torch.device, advance: Callable[..., None]
) -> None:
    """Train the network for `config.pretrain_epochs` epochs on brightness, then make its segmentation head anew."""
    fresh = [value.detach().clone() for value in _head(network).parameters()]
    batches = EpochBatches(len(dataset), config.batch_size, config.seed)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=config.workers)
    optimizer = build_optimizer(network, config)
    highest = [group["lr"] for group in optimizer.param_groups]
    autocast, _ = build_autocast("fp32" if config.precision == "fp16" else config.precision, device)
    random = torch.Generator().manual_seed(config.seed)
    feed = Feed(dataset.config, device)
    network.train()
    steps, total = 0, config.pretrain_epochs * len(batches)
    for epoch in range(config.pretrain_epochs):
        dataset.epoch = batches.epoch = 1_000_000 + epoch  # other augmentations than training's
        for image, mask in loader:
            for group, rate in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = rate * rate_factor(steps / total, 0.1)
            pixels, truth = feed(image, mask)
            target = brightness(pixels, truth.shape[1])
            with autocast():
                found = network(hide(pixels, random))
            logits = found[0] if isinstance(found, tuple) else found
            loss = functional.binary_cross_entropy_with_logits(logits.float(), target)
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            steps += 1
            advance(len(image), loss=float(loss.detach()))
    with torch.no_grad():
        for value, first in zip(_head(network).parameters(), fresh, strict=True):
            value.copy_(first)


def brightness(pixels: torch.Tensor, classes: int) -> torch.Tensor:
    """Return (N, C, H, W) float32 of 0 and 1: where the smoothed brightness exceeds its quantile k / (C + 1).

    `pixels` is the (N, 3, H, W) normalised image.
    """
    grey = functional.avg_pool2d(pixels.mean(dim=1, keepdim=True), SMOOTH, stride=1, padding=SMOOTH // 2)
    flat = grey.flatten(1)
    shares = torch.arange(1, classes + 1, device=pixels.device, dtype=flat.dtype) / (classes + 1)
    cuts = torch.quantile(flat[:, :: max(1, flat.shape[1] // 20_000)], shares, dim=1).T
    return (grey > cuts[:, :, None, None]).float()


def hide(pixels: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Return the images with about half of their blocks at the mean."""
    images, _, height, width = pixels.shape
    rows, columns = -(-height // BLOCK), -(-width // BLOCK)
    shown = (torch.rand((images, 1, rows, columns), generator=random) >= HIDDEN).to(pixels.device, pixels.dtype)
    whole = shown.repeat_interleave(BLOCK, dim=2).repeat_interleave(BLOCK, dim=3)
    return pixels * whole[:, :, :height, :width]


def _head(network: nn.Module) -> nn.Module:
    head = getattr(network, "segmentation_head", network)
    assert isinstance(head, nn.Module)
    return head
