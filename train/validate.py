"""Validation: held-out probabilities as the artifact computes them, the best rules and their Dice."""

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

from cloudrt.masks.rle import unpack_mask
from cloudrt.model.network import InferenceGraph
from cloudrt.model.network_config import VIEWS, NetworkConfig
from cloudrt.search.choose import choose_rules
from cloudrt.search.probabilities import write_probabilities
from cloudrt.search.tables import THRESHOLDS, BestRule, LabelledMaps, measure, min_areas_for, search_rules
from cloudrt.system.files import naming, reserve

from .cache import DatasetCache

COARSE = tuple(range(63, 240, 8))
"""Thresholds to search after each epoch."""

Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Validation:
    """The best rules on the held-out images, their mean Dice, the loss, and the Dice if all rows are empty."""

    found: list[BestRule]
    dice: float
    loss: float
    all_empty: float


@dataclass(frozen=True)
class Validator:
    """Validates networks on the held-out images.

    Parameters
    ----------
    loss
        Loss of the masks.
    cache, positions
        The held-out images.
    batch_size
        Images per batch.
    device, autocast
        Device and precision.
    tta
        Name, a key of `VIEWS`, of the flips of the final validation and of the stored probabilities.
    scratch
        Folder for a temporary memory-mapped file of the probabilities, which may be larger than memory.
    """

    loss: nn.Module
    cache: DatasetCache
    positions: NDArray[np.int_]
    batch_size: int
    device: torch.device
    autocast: Autocast
    tta: str
    scratch: Path

    def run(
        self, network: nn.Module, config: NetworkConfig, final: bool = False, keep: Path | None = None
    ) -> Validation:
        """Compute the held-out probabilities and find the best rules.

        Parameters
        ----------
        network, config
            The network and its configuration.
        final
            Search all thresholds, gates and presence levels as `cloudrt tune` does, and report the out-of-fold Dice;
            otherwise, or with a single image, search the thresholds in `COARSE` and all min areas, and report the Dice
            on the same images. Without `final` and `keep`, the flips of `tta` are not used.
        keep
            File to store the probabilities in, for `cloudrt tune`.
        """
        width, height = config.labels.submit_grid[::-1]
        classes, images = len(config.labels.classes), len(self.positions)
        truth = np.asarray(self.cache.truth[self.positions])
        presence = None if config.presence == "none" else np.zeros((images, classes), np.uint8)
        views = VIEWS[self.tta if final or keep else "none"]
        was_training = network.training
        network.eval()
        losses = 0.0
        with naming(self.scratch), tempfile.TemporaryFile(dir=self.scratch) as file:
            probability = np.memmap(file, np.uint8, "w+", shape=(images, classes, width, height))
            reserve(file.fileno())
            for begin in range(0, images, self.batch_size):
                part = slice(begin, begin + self.batch_size)
                image = torch.from_numpy(np.asarray(self.cache.images[self.positions[part]])).to(self.device)
                with torch.inference_mode():
                    levels, batch_presence, loss = self._batch(network, config, image, truth[part], views)
                probability[part] = levels.cpu().numpy()
                if presence is not None and batch_presence is not None:
                    presence[part] = batch_presence.cpu().numpy()
                losses += float(loss) * len(image)
            found = _search(probability, truth, presence, min_areas_for(config.labels.submit_grid), final)
            if keep:
                with write_probabilities(keep, config.labels) as writer:
                    for row, position in enumerate(self.positions):
                        one = None if presence is None else presence[row]
                        writer.add(self.cache.names[position], np.asarray(probability[row]), one)
            del probability
        network.train(was_training)
        dice = float(np.mean([one.dice for one in found]))
        return Validation(found, dice, losses / images, float((~truth.any(axis=2)).mean()))

    def _batch(
        self,
        network: nn.Module,
        config: NetworkConfig,
        image: torch.Tensor,
        truth: NDArray[np.uint8],
        views: tuple[tuple[int, ...], ...],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return the levels, the presence and the loss of a batch; the loss is that of the first view (no flip)."""
        kept: list[torch.Tensor] = []
        autocast = self.autocast

        class Keep(nn.Module):
            def forward(self, normalised: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
                with autocast():
                    found = network(normalised)
                logits, head = found if isinstance(found, tuple) else (found, None)
                kept.append(logits.float())
                return kept[-1] if head is None else (kept[-1], head.float())

        graph = InferenceGraph(Keep(), config).to(image.device)
        levels = image.to(torch.float32).permute(0, 3, 1, 2)
        answer = graph.quantise_outputs(*graph.predict_probability(levels, views))
        found, presence = answer if isinstance(answer, tuple) else (answer, None)
        height, width = config.labels.submit_grid
        masks = np.stack([[unpack_mask(bits, (height, width)) for bits in one] for one in truth])
        target = functional.interpolate(torch.from_numpy(masks).to(image.device, torch.float32), size=kept[0].shape[2:])
        return found, presence, self.loss(kept[0][: len(image)], target)


def _search(
    probability: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    presence: NDArray[np.uint8] | None,
    min_areas: tuple[int, ...],
    final: bool,
) -> list[BestRule]:
    if not final or len(probability) < 2:
        return search_rules(probability, truth, COARSE, min_areas)
    heads = [None] * len(probability) if presence is None else list(presence)
    maps = (LabelledMaps(*one) for one in zip(probability, truth, heads, strict=True))
    tables = measure(maps, len(probability), THRESHOLDS, min_areas)
    return [BestRule(choice.rule, choice.out_of_fold) for choice in choose_rules(tables)]


def choose_no_data(
    run: Callable[[NetworkConfig], Validation], config: NetworkConfig
) -> tuple[NetworkConfig, Validation, float]:
    """Validate with and without a probability of zero where the image has no data.

    Returns
    -------
    config, result
        The better configuration and its validation.
    gain
        Dice with it minus Dice without.
    """
    on = replace(config, subtract_no_data=True)
    off = replace(config, subtract_no_data=False)
    subtracted, without = run(on), run(off)
    gain = subtracted.dice - without.dice
    return (on, subtracted, gain) if gain > 0 else (off, without, gain)
