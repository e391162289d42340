"""Configurations that train in seconds, and a dataset cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from cloudrt.train.cache import DatasetCache
from cloudrt.train.config import TrainConfig
from numpy.typing import NDArray

from cloudrt.masks.rle import pack_mask
from cloudrt.model.checkpoint import Checkpoint

SMALL = TrainConfig(
    encoder="resnet18",
    encoder_weights="none",
    options={"decoder_pyramid_channels": 16, "decoder_segmentation_channels": 32},
    input_size=(64, 96),
    epochs=2,
    batch_size=4,
    accumulate=2,
    validation_share=0.2,
    precision="fp32",
)
TOGETHER = replace(
    SMALL,
    batch_size=2,
    schedule="constant",
    freeze_batchnorm=True,
    loss="bce+dice",
    loss_over="samples",
    augment="notebook",
    encoder_lr=2e-5,
    decoder_lr=2e-5,
    device="cpu",
)
"""Two processes with these batches of 2 train as one process does with batches of 4."""


def toy_cache(classes: NDArray[np.bool_], images: NDArray[np.uint8] | None = None) -> DatasetCache:
    """A cache of N images: image n has a mask of class c if `classes[n, c]`. Image 3.jpg could not be read."""
    mask = np.zeros((60, 90), np.uint8)
    mask[:9] = 1
    one, none = pack_mask(mask), pack_mask(np.zeros_like(mask))
    truth = np.array([[one if present else none for present in row] for row in classes])
    if images is None:
        images = np.random.default_rng(0).integers(0, 256, (len(classes), 16, 24, 3), np.uint8)
    return DatasetCache([f"{number}.jpg" for number in range(len(classes))], images, truth, {"3.jpg": "is empty"})


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint."""
    return Checkpoint.load(path).weights
