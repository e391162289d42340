"""Held-out probabilities as the artifact would give them, and what they score."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from cloudrt.choose import choose_rules
from cloudrt.network import InferenceGraph, NetworkConfig
from cloudrt.search import (
    THRESHOLDS,
    Found,
    LabelledMaps,
    measure,
    min_areas_for,
    search_rules,
    unpack_mask,
)

from .cache import DatasetCache

COARSE = tuple(range(63, 240, 8))
"""Thresholds that are searched after each epoch."""

Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Validation:
    """The best rules on the held-out images, their mean Dice, the loss, and the Dice of predicting nothing."""

    found: list[Found]
    dice: float
    loss: float
    all_empty: float


def validate(
    network: nn.Module,
    loss_function: nn.Module,
    config: NetworkConfig,
    cache: DatasetCache,
    positions: NDArray[np.int_],
    batch_size: int,
    device: torch.device,
    autocast: Autocast,
    scratch: Path,
    final: bool = False,
) -> Validation:
    """Run the network over the held-out images and search the rules.

    In each epoch the best of a coarse grid of rules will do; the `final` rules are chosen from all 256 thresholds as
    `cloudrt tune` chooses them, and their Dice is that out of fold. The probabilities go to a memory-mapped file in
    `scratch` that is gone afterwards: memory stays flat however many images are held out.
    """
    width, height = config.labels.submit_grid[::-1]
    shape = (len(positions), len(config.labels.classes), width, height)
    truth = np.asarray(cache.truth[positions])
    was_training = network.training
    network.eval()
    losses = 0.0
    with tempfile.TemporaryFile(dir=scratch) as file:
        probability = np.memmap(file, np.uint8, "w+", shape=shape)
        for begin in range(0, len(positions), batch_size):
            chosen = positions[begin : begin + batch_size]
            image = torch.from_numpy(np.asarray(cache.images[chosen])).to(device)
            with torch.inference_mode():
                levels, batch_loss = _run(
                    network, loss_function, config, image, truth[begin : begin + batch_size], autocast
                )
            probability[begin : begin + len(chosen)] = levels.cpu().numpy()
            losses += float(batch_loss) * len(chosen)
        found = _search(probability, truth, min_areas_for(config.labels.submit_grid), final)
        del probability
    network.train(was_training)
    return Validation(
        found, float(np.mean([one.dice for one in found])), losses / len(positions), float((~truth.any(axis=2)).mean())
    )


def _search(
    probability: NDArray[np.uint8], truth: NDArray[np.uint8], min_areas: tuple[int, ...], final: bool
) -> list[Found]:
    if not final or len(probability) < 2:
        return search_rules(probability, truth, COARSE, min_areas)
    maps = (LabelledMaps(*one) for one in zip(probability, truth, strict=True))
    tables = measure(maps, len(probability), THRESHOLDS, min_areas)
    return [Found(choice.rule, choice.out_of_fold) for choice in choose_rules(tables)]


def _run(
    network: nn.Module,
    loss_function: nn.Module,
    config: NetworkConfig,
    image: torch.Tensor,
    truth: NDArray[np.uint8],
    autocast: Autocast,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the levels and the loss of a batch, the network having run once for both."""
    kept: list[torch.Tensor] = []

    class Keep(nn.Module):
        def forward(self, normalised: torch.Tensor) -> torch.Tensor:
            with autocast():
                logits = network(normalised)
            assert isinstance(logits, torch.Tensor)
            kept.append(logits.float())
            return kept[0]

    levels = InferenceGraph(Keep(), config).to(image.device)(image)
    height, width = config.labels.submit_grid
    masks = np.stack([[unpack_mask(bits, (height, width)) for bits in one] for one in truth])
    target = functional.interpolate(torch.from_numpy(masks).to(image.device, torch.float32), size=kept[0].shape[2:])
    return levels, loss_function(kept[0], target)


def choose_no_data(
    run: Callable[[NetworkConfig], Validation], config: NetworkConfig
) -> tuple[NetworkConfig, Validation, float]:
    """Return the configuration that scores higher, with or without subtracting no-data, its result, and the gain."""
    on = replace(config, subtract_no_data=True)
    off = replace(config, subtract_no_data=False)
    with_bands, without = run(on), run(off)
    gain = with_bands.dice - without.dice
    return (on, with_bands, gain) if gain > 0 else (off, without, gain)
