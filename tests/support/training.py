"""Configurations that train in seconds, what they train on, and runs that are interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cloudrt.train import epochs
from cloudrt.train.cache import DatasetCache
from cloudrt.train.config import TrainConfig
from numpy.typing import NDArray
from support.networks import OPTIONS

from cloudrt.masks.rle import pack_mask
from cloudrt.model.checkpoint import Checkpoint

SMALL = TrainConfig(
    encoder="resnet18",
    encoder_weights="none",
    options=OPTIONS,
    input_size=(64, 96),
    epochs=2,
    batch_size=4,
    accumulate=2,
    validation_share=0.2,
    precision="fp32",
)
TOGETHER = replace(
    SMALL,
    options=OPTIONS | {"decoder_dropout": 0.0},
    batch_size=2,
    schedule="constant",
    freeze_batchnorm=True,
    loss="bce+dice",
    loss_over="samples",
    augment="notebook",
    encoder_lr=2e-3,
    decoder_lr=2e-3,
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


def train_arguments(data: Path, runs: Path, cache: Path, *more: str) -> list[str]:
    """Return the arguments of cloudrt-train for a small, untrained network on the CPU; `more` overrides them."""
    network = ["--encoder", "resnet18", "--encoder-weights", "none", "--input-size", "96x64"]
    network += [word for key, value in OPTIONS.items() for word in ("--set", f"{key}={value}")]
    folders = ["--runs", str(runs), "--name", "run", "--cache", str(cache)]
    return [str(data), *folders, *network, "--epochs", "1", "--device", "cpu", *more]


def interrupt_after(epoch: int, patch: pytest.MonkeyPatch) -> None:
    """Interrupt runs in the validation of the first epoch after `epoch`."""
    real = epochs.Run._validate

    def stop(self: epochs.Run, number: int, *words: Any) -> Any:
        if number > epoch:
            raise KeyboardInterrupt
        return real(self, number, *words)

    patch.setattr(epochs.Run, "_validate", stop)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint."""
    return Checkpoint.load(path).weights
