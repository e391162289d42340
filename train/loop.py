"""One training run: data set to runs/NAME/best.pth, last.pth, state.pth, config.json, held_out.txt,
history.csv, curves.png.

`train` opens the cache, splits it, and for each epoch trains, validates by the competition's Dice at the submission
grid and writes what it has; at the end the best epoch's rules are chosen from every threshold and stored in best.pth.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cloudrt.data.folder import open_data
from cloudrt.errors import DataError
from cloudrt.masks.postprocess import Rule
from cloudrt.model.network import Checkpoint, NetworkConfig, write_tensors
from cloudrt.system.files import locked, replacing
from cloudrt.system.statistics import memory

from .cache import DatasetCache, open_cache
from .config import TrainConfig
from .curves import plot_curves, write_history, write_tensorboard
from .dataset import CloudDataset
from .distributed import Processes, processes
from .folds import folds, split
from .optimise import find_device, seed_all
from .pretrain import pretrain
from .start import STATE, check_shape, describe_images, read_state, start
from .trainer import Trainer
from .validate import Validation, Validator, choose_no_data

logger = logging.getLogger(__name__)

PROBABILITIES = "held_out.npz"
LOCK = ".lock"

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


def train(
    config: TrainConfig, data: Path, folder: Path, cache_root: Path, bar: Bar = no_bar, *, resume: bool = False
) -> TrainResult:
    """Train a network on `data` and write the run to `folder`; with `resume`, go on after its last whole epoch.

    Several processes that `torchrun` started train one network; the first validates and writes.

    Raises
    ------
    DataError
        Data that is missing or malformed, a network that cannot be built, a loss that is not finite; a run to resume
        that had other options, named.
    """
    advice = "wait for it, or give another --name"
    with processes(config.device) as team, locked(folder / LOCK, advice) if team.first else nullcontext():
        return _train(config, data, folder, cache_root, bar if team.first else no_bar, resume, team)


def _train(
    config: TrainConfig, data: Path, folder: Path, cache_root: Path, bar: Bar, resume: bool, team: Processes
) -> TrainResult:
    source = open_data(data)
    device = find_device(config.device, team.local_rank)
    network_config = NetworkConfig(
        config.architecture,
        config.encoder,
        dict(config.options),
        config.input_size,
        labels=source.labels,
        presence=config.presence,
        top_k=config.top_k,
    )
    seed_all(config.seed)
    state = read_state(folder, config) if resume else None
    network, origin = start(config, network_config, resumed=state is not None)
    network = network.to(device).to(memory_format=torch.channels_last)
    names = list(source.read_train())[: config.limit or None]
    if not team.first:
        team.wait()  # the first one makes the cache
    with bar("Caching images", len(names)) as advance:
        cache = open_cache(source, config.input_size, cache_root, config.limit, advance)
        advance(0)
    if team.first:
        team.wait()
    training, held_out = _split(cache, config)
    images = describe_images(cache.names, training, held_out, source.labels)
    if state and state["images"] != images:
        raise DataError(f"{folder} was begun with other images or classes than {data} has now: --overwrite it")
    check_shape(network, network_config)
    logger.info(
        "%d images to train on, %d held out, %d unreadable; %s with %s on %s",
        len(training),
        len(held_out),
        len(cache.failures),
        config.architecture,
        config.encoder,
        device,
    )
    _warn_of_absent_classes(cache, held_out, source.labels.classes)
    if team.first:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder, keep_results=state is not None)
        with replacing(folder / "config.json") as path:
            stored = config.to_dict() | {"data": str(data), "network": network_config.to_dict()}
            path.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        with replacing(folder / "held_out.txt") as path:  # what `cloudrt tune --images` takes
            path.write_text("".join(f"{cache.names[position]}\n" for position in held_out), encoding="utf-8")
    dataset = CloudDataset(cache, training, network_config, config.augment, config.seed)
    if config.pretrain_epochs and state is None:
        with bar("Pre-training", config.pretrain_epochs * len(dataset)) as advance:
            pretrain(network, dataset, config, device, advance)
    trainer = Trainer(config, network, dataset, device, team)
    validator = Validator(
        trainer.loss, cache, held_out, config.batch_size, device, trainer.autocast, config.tta, folder
    )
    return _Run(config, network_config, trainer, validator, folder, team, state, origin, images).run(bar)


class _Run:
    """A run: epochs, their validation, and what is written."""

    def __init__(
        self,
        config: TrainConfig,
        network_config: NetworkConfig,
        trainer: Trainer,
        validator: Validator,
        folder: Path,
        team: Processes,
        state: dict[str, Any] | None,
        origin: str,
        images: str,
    ) -> None:
        self.config, self.network_config = config, network_config
        self.trainer, self.validator, self.folder, self.team = trainer, validator, folder, team
        self.origin, self.images = origin, images
        self.history: list[dict[str, float]] = []
        self.best_dice = -1.0
        self.done = 0
        if state:
            trainer.load_state_dict(state["trainer"])
            self.history, self.best_dice, self.done = state["history"], state["best_dice"], state["epoch"]
            logger.info("going on after epoch %d", self.done)
        elif team.first:
            self._save_state(0)

    def run(self, bar: Bar) -> TrainResult:
        config, trainer = self.config, self.trainer
        for epoch in range(self.done + 1, config.epochs + 1):
            if trainer.out_of_time:
                break
            rates = self._rates()
            before = trainer.seconds
            with bar(f"Epoch {epoch}/{config.epochs}", trainer.images_an_epoch) as advance:
                train_loss = trainer.epoch(epoch, advance)
            loss = 0.0
            if self.team.first:
                loss = self._validate(epoch, train_loss, rates, trainer.seconds - before)
            trainer.schedule.report(self.team.share(loss))
            if self.team.first:
                self._save_state(epoch)
        result = self._finish() if self.team.first else TrainResult(self.folder, 0.0, 0, 0.0, 0.0)
        self.team.wait()
        return result

    def _validate(self, epoch: int, train_loss: float, rates: tuple[float, float], seconds: float) -> float:
        result = self.validator.run(self.trainer.evaluated, self.network_config)
        self._record(epoch, train_loss, result, rates, seconds)
        checkpoint = self._checkpoint(self.network_config, result, epoch)
        checkpoint.save(self.folder / "last.pth")
        if result.dice > self.best_dice:
            self.best_dice = result.dice
            checkpoint.save(self.folder / "best.pth")
        logger.info(
            "epoch %d/%d: loss %.4f, held out %.4f, Dice %.4f (best %.4f), all empty %.4f",
            epoch,
            self.config.epochs,
            train_loss,
            result.loss,
            result.dice,
            self.best_dice,
            result.all_empty,
        )
        return result.loss

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
            "images_per_second": self.trainer.images_an_epoch / seconds,
            "memory_mb": memory() or 0.0,
        }
        for label, found in zip(self.network_config.labels.classes, result.found, strict=True):
            row[f"dice_{label}"] = found.dice
        self.history.append(row)
        write_history(self.history, self.folder / "history.csv")
        plot_curves(self.history, self.folder / "curves.png")
        if self.config.tensorboard:
            write_tensorboard(row, self.folder / "tensorboard")

    def _rates(self) -> tuple[float, float]:
        encoder, decoder = (group["lr"] for group in self.trainer.optimizer.param_groups)
        return float(encoder), float(decoder)

    def _checkpoint(self, config: NetworkConfig, result: Validation, epoch: int) -> Checkpoint:
        state = self.trainer.evaluated.state_dict()
        weights = {name: value.detach().cpu().clone() for name, value in state.items()}
        rules: tuple[Rule, ...] = tuple(found.rule for found in result.found)
        history = list(self.history)
        return Checkpoint(config, weights, rules, result.dice, epoch, history, self.config.to_dict(), self.origin)

    def _save_state(self, epoch: int) -> None:
        values = {
            "config": self.config.to_dict(),
            "images": self.images,
            "trainer": self.trainer.state_dict(),
            "history": self.history,
            "best_dice": self.best_dice,
            "epoch": epoch,
        }
        write_tensors(self.folder / STATE, values)

    def _finish(self) -> TrainResult:
        """Choose the best epoch's rules from every threshold, with and without no-data; store the better."""
        best = Checkpoint.load(self.folder / "best.pth")
        network = self.trainer.evaluated
        network.load_state_dict(best.weights)
        config, result, gain = choose_no_data(
            lambda one: self.validator.run(network, one, final=True), self.network_config
        )
        logger.info("subtracting no-data changes held-out Dice by %+.4f: %s", gain, "on" if gain > 0 else "off")
        rules = tuple(found.rule for found in result.found)
        final = replace(best, config=config, rules=rules, dice=result.dice, history=list(self.history))
        final.save(self.folder / "best.pth")
        if self.config.folds:
            self.validator.run(network, config, keep=self.folder / PROBABILITIES)
        (self.folder / STATE).unlink(missing_ok=True)
        images = len(self.history) * self.trainer.images_an_epoch
        return TrainResult(
            self.folder, final.dice, final.epoch, result.all_empty, images / max(self.trainer.seconds, 1e-9)
        )


def _clear(folder: Path, keep_results: bool) -> None:
    """Remove what a killed run left half written, and the results of one that is overwritten."""
    for path in folder.glob(".*.part"):
        path.unlink(missing_ok=True)
    if not keep_results:
        for name in ("best.pth", "last.pth", "history.csv", "curves.png", PROBABILITIES, STATE):
            (folder / name).unlink(missing_ok=True)


def _split(cache: DatasetCache, config: TrainConfig) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """Return the positions to train on and to hold out."""
    for name, reason in cache.failures.items():
        logger.warning("%s %s: left out", name, reason)
    if not config.folds:
        return split(cache, config.validation_share, config.seed)
    parts = folds(cache, config.folds, config.seed, config.group_similar)
    rest = [part for number, part in enumerate(parts) if number != config.fold]
    return np.sort(np.concatenate(rest)), parts[config.fold]


def _warn_of_absent_classes(cache: DatasetCache, held_out: NDArray[np.int_], classes: tuple[str, ...]) -> None:
    present: NDArray[np.bool_] = np.any(cache.truth[held_out], axis=(0, 2))
    absent = [label for label, found in zip(classes, present.tolist(), strict=True) if not found]
    if absent:
        logger.warning(
            "no held-out image has %s: nothing tells which of its masks are right; hold out more, or use --folds",
            ", ".join(absent),
        )
