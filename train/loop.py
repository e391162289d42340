"""One training run: data set to runs/NAME/best.pth, last.pth, config.json, held_out.txt,
history.csv, curves.png.

`train` opens the cache, splits it, and for each epoch trains, validates by the competition's Dice at the submission
grid and writes what it has; at the end the best epoch's rules are chosen from every threshold and stored in best.pth.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader

from cloudrt.data import open_data
from cloudrt.errors import DataError
from cloudrt.files import replacing
from cloudrt.network import Checkpoint, NetworkConfig, build_network
from cloudrt.postprocess import Rule

from .cache import DatasetCache, open_cache
from .config import TrainConfig
from .curves import plot_curves, write_history
from .dataset import CloudDataset
from .losses import build_loss
from .optimise import build_autocast, build_optimizer, build_schedule, find_device, seed_all
from .validate import Validation, choose_no_data, validate

logger = logging.getLogger(__name__)

Bar = Callable[[str, int], AbstractContextManager[Callable[..., None]]]
"""`bar(description, total)` gives `advance(n, **fields)`: how the caller shows progress."""


@contextmanager
def no_bar(description: str, total: int) -> Iterator[Callable[..., None]]:
    """Show nothing."""
    yield lambda n=1, **fields: None


@dataclass(frozen=True)
class TrainResult:
    """What a run ends with: the folder, the best held-out mean Dice, its epoch, and the Dice of predicting nothing."""

    folder: Path
    dice: float
    epoch: int
    all_empty: float
    images_per_second: float


def train(config: TrainConfig, data: Path, folder: Path, cache_root: Path, bar: Bar = no_bar) -> TrainResult:
    """Train a network on `data` and write the run to `folder`.

    Raises
    ------
    DataError
        Data that is missing or malformed, a network that cannot be built, a loss that is not finite.
    """
    source = open_data(data)
    device = find_device(config.device)
    network_config = _network_config(config, source.labels)
    seed_all(config.seed)
    network = _build(config, network_config).to(device).to(memory_format=torch.channels_last)
    names = list(source.read_train())[: config.limit or None]
    with bar("Caching images", len(names)) as advance:
        cache = open_cache(source, config.input_size, cache_root, config.limit, advance)
        advance(0)
    training, held_out = _split(cache, config)
    logger.info(
        "%d images to train on, %d held out, %d unreadable; %s with %s on %s",
        len(training), len(held_out), len(cache.failures), config.architecture, config.encoder, device,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "config.json") as path:
        stored = config.to_dict() | {"data": str(data), "network": network_config.to_dict()}
        path.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
    with replacing(folder / "held_out.txt") as path:  # what `cloudrt tune --images` takes
        path.write_text("".join(f"{cache.names[position]}\n" for position in held_out), encoding="utf-8")
    run = _Run(config, network_config, network, device, cache, training, held_out, folder)
    return run.run(bar)


class _Run:
    """The state of a run: network, optimiser, schedule, history."""

    def __init__(
        self,
        config: TrainConfig,
        network_config: NetworkConfig,
        network: nn.Module,
        device: torch.device,
        cache: DatasetCache,
        training: NDArray[np.int_],
        held_out: NDArray[np.int_],
        folder: Path,
    ) -> None:
        self.config = config
        self.network_config = network_config
        self.network = network
        self.device = device
        self.cache = cache
        self.held_out = held_out
        self.folder = folder
        self.dataset = CloudDataset(cache, training, network_config, config.augment, config.seed)
        self.loader = DataLoader(
            self.dataset,
            batch_size=min(config.batch_size, len(training)),
            shuffle=True,
            drop_last=True,
            num_workers=config.workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator().manual_seed(config.seed),
        )
        self.loss = build_loss(config.loss).to(device)
        self.optimizer = build_optimizer(network, config)
        self.steps = -(-len(self.loader) // config.accumulate)
        self.schedule = build_schedule(self.optimizer, config, self.steps)
        self.autocast, scaled = build_autocast(config.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.history: list[dict[str, float]] = []

    def run(self, bar: Bar) -> TrainResult:
        best: Checkpoint | None = None
        seconds = 0.0
        for epoch in range(1, self.config.epochs + 1):
            rates = self._rates()
            began = time.perf_counter()
            train_loss = self._epoch(epoch, bar)
            elapsed = time.perf_counter() - began
            seconds += elapsed
            result = self._validate(self.network_config)
            if isinstance(self.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
                self.schedule.step(result.loss)
            self._record(epoch, train_loss, result, rates, elapsed)
            checkpoint = self._checkpoint(self.network_config, result, epoch)
            checkpoint.save(self.folder / "last.pth")
            if best is None or result.dice > best.dice:
                best = checkpoint
                best.save(self.folder / "best.pth")
            logger.info(
                "epoch %d/%d: loss %.4f, held out %.4f, Dice %.4f (best %.4f), all empty %.4f",
                epoch, self.config.epochs, train_loss, result.loss, result.dice, best.dice, result.all_empty,
            )  # fmt: skip
        assert best is not None
        return self._finish(best, seconds)

    def _epoch(self, epoch: int, bar: Bar) -> float:
        """Train one epoch; return the mean loss."""
        self.dataset.epoch = epoch
        self.network.train()
        total = 0.0
        batches = len(self.loader)
        images = self.loader.batch_size or 1
        with bar(f"Epoch {epoch}/{self.config.epochs}", batches * images) as advance:
            for number, (image, target) in enumerate(self.loader, start=1):
                group = self._group(number, batches)
                pixels = image.to(self.device, non_blocking=True, memory_format=torch.channels_last)
                with self.autocast():
                    logits = self.network(pixels)
                loss = self.loss(logits.float(), target.to(self.device, non_blocking=True))
                value = float(loss.detach())
                if not np.isfinite(value):
                    raise DataError(
                        f"the loss is {value} at epoch {epoch}, batch {number}: lower the learning rates or use "
                        f"--precision fp32; {self.folder} keeps the checkpoints of the epochs before"
                    )
                self.scaler.scale(loss / group).backward()
                if number % self.config.accumulate == 0 or number == batches:
                    self.scaler.step(self.optimizer)
                    self.scaler.update()
                    self.optimizer.zero_grad(set_to_none=True)
                    if isinstance(self.schedule, torch.optim.lr_scheduler.OneCycleLR):
                        self.schedule.step()
                total += value
                advance(images, loss=total / number)
        return total / batches

    def _group(self, number: int, batches: int) -> int:
        """Return how many batches share the optimiser step of batch `number`; the last group may be smaller."""
        accumulate = self.config.accumulate
        last_group = batches - batches % accumulate
        return batches % accumulate if number > last_group else accumulate

    def _validate(self, config: NetworkConfig, final: bool = False) -> Validation:
        return validate(
            self.network, self.loss, config, self.cache, self.held_out, self.config.batch_size,
            self.device, self.autocast, self.folder, final,
        )  # fmt: skip

    def _record(
        self, epoch: int, train_loss: float, result: Validation, rates: tuple[float, float], seconds: float
    ) -> None:
        row = {
            "epoch": float(epoch),
            "train_loss": train_loss,
            "valid_loss": result.loss,
            "dice": result.dice,
            "all_empty": result.all_empty,
            "encoder_lr": rates[0],
            "decoder_lr": rates[1],
            "images_per_second": len(self.loader) * (self.loader.batch_size or 1) / seconds,
        }
        for label, found in zip(self.network_config.labels.classes, result.found, strict=True):
            row[f"dice_{label}"] = found.dice
        self.history.append(row)
        write_history(self.history, self.folder / "history.csv")
        plot_curves(self.history, self.folder / "curves.png")

    def _rates(self) -> tuple[float, float]:
        encoder, decoder = (group["lr"] for group in self.optimizer.param_groups)
        return float(encoder), float(decoder)

    def _checkpoint(self, config: NetworkConfig, result: Validation, epoch: int) -> Checkpoint:
        weights = {name: value.detach().cpu().clone() for name, value in self.network.state_dict().items()}
        rules: tuple[Rule, ...] = tuple(found.rule for found in result.found)
        origin = "" if self.config.encoder_weights == "none" else f"encoder from ImageNet weights of {config.encoder}"
        history = list(self.history)
        return Checkpoint(config, weights, rules, result.dice, epoch, history, self.config.to_dict(), origin)

    def _finish(self, best: Checkpoint, seconds: float) -> TrainResult:
        """Choose the best epoch's rules from every threshold, with and without no-data; store the better."""
        self.network.load_state_dict(best.weights)
        config, result, gain = choose_no_data(partial(self._validate, final=True), self.network_config)
        logger.info("subtracting no-data changes held-out Dice by %+.4f: %s", gain, "on" if gain > 0 else "off")
        rules = tuple(found.rule for found in result.found)
        final = replace(best, config=config, rules=rules, dice=result.dice, history=list(self.history))
        final.save(self.folder / "best.pth")
        images = len(self.history) * len(self.loader) * (self.loader.batch_size or 1)
        return TrainResult(self.folder, final.dice, final.epoch, result.all_empty, images / seconds)


def _network_config(config: TrainConfig, labels: Any) -> NetworkConfig:
    return NetworkConfig(config.architecture, config.encoder, dict(config.options), config.input_size, labels=labels)


def _build(config: TrainConfig, network_config: NetworkConfig) -> nn.Module:
    if config.encoder_weights == "none":
        logger.info("encoder %s starts from scratch", config.encoder)
        return build_network(network_config)
    logger.info("encoder %s starts from ImageNet weights, downloaded unless cached", config.encoder)
    return build_network(network_config, "imagenet")


def _split(cache: DatasetCache, config: TrainConfig) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """Return the positions to train on and to hold out: a seeded shuffle of the readable images, by name order."""
    for name, reason in cache.failures.items():
        logger.warning("%s %s: left out", name, reason)
    readable = np.array([i for i, name in enumerate(cache.names) if name not in cache.failures])
    order = np.random.default_rng(config.seed).permutation(readable)
    held_out = max(1, round(len(order) * config.validation_share))
    if len(order) - held_out < 1:
        raise DataError(
            f"{len(order)} images and a validation share of {config.validation_share} leave none to train on"
        )
    return np.sort(order[held_out:]), np.sort(order[:held_out])
