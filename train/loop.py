"""A training run: data set -> best.pth, last.pth, state.pth, config.json, held_out.txt, history.csv, curves.png.

`train` opens the dataset cache and splits it. After each epoch it validates with the competition's Dice on the
submission grid and writes the checkpoints. At the end, the rules of the best epoch are searched on all thresholds and
stored in best.pth.
"""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cloudrt.data.folder import open_data
from cloudrt.errors import DataError
from cloudrt.model.checkpoint import Checkpoint, write_tensors
from cloudrt.model.network_config import NetworkConfig
from cloudrt.system.files import locked, replacing
from cloudrt.system.progress import ProgressBar, no_progress
from cloudrt.system.statistics import memory

from .cache import DatasetCache, open_cache
from .config import TrainConfig
from .curves import plot_curves, write_history, write_tensorboard
from .dataset import CloudDataset
from .distributed import Processes, processes
from .folds import folds, split
from .optimise import find_device, find_precision, seed_all
from .pretrain import pretrain
from .start import STATE, check_shape, describe_images, read_state, start
from .trainer import Trainer
from .validate import Validation, Validator, choose_no_data

logger = logging.getLogger(__name__)

PROBABILITIES = "held_out.npz"
LOCK = ".lock"


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Parameters
    ----------
    folder
        The run folder.
    dice
        Held-out mean Dice of the best epoch, out of fold; see `Validator.run`.
    epoch
        Number of the best epoch; 0 in processes other than rank 0.
    all_empty
        Held-out mean Dice if all rows are empty.
    images_per_second
        Mean training speed.
    """

    folder: Path
    dice: float
    epoch: int
    all_empty: float
    images_per_second: float


def train(
    config: TrainConfig,
    data: Path,
    folder: Path,
    cache_root: Path,
    bar: ProgressBar = no_progress,
    *,
    resume: bool = False,
) -> TrainResult:
    """Train a network on the data set `data` and write the run to `folder`.

    With `resume`, continue after the last complete epoch. Under `torchrun`, all processes train one network, and rank 0
    validates and writes the files.

    Raises
    ------
    DataError
        Missing or malformed data, a network that cannot be built, or a loss that is not finite; a run to resume that
        had other options.
    """
    advice = "wait until it ends, or use another --name"
    with processes(config.device) as team, locked(folder / LOCK, advice) if team.first else nullcontext():
        return _train(config, data, folder, cache_root, bar if team.first else no_progress, resume, team)


def _train(
    config: TrainConfig, data: Path, folder: Path, cache_root: Path, bar: ProgressBar, resume: bool, team: Processes
) -> TrainResult:
    source = open_data(data)
    device = find_device(config.device, team.local_rank)
    seed_all(config.seed)
    state = read_state(folder, config) if resume else None
    begun = start(config, source.labels, state)
    network = begun.network.to(device).to(memory_format=torch.channels_last)
    names = list(source.read_train())[: config.limit or None]
    unlisted = source.describe_unlisted()
    if unlisted and team.first:
        logger.warning("%s", unlisted)
    if not team.first:
        team.wait()  # rank 0 builds the cache
    with bar("Caching images", len(names)) as advance:
        cache = open_cache(source, config.input_size, cache_root, config.limit, advance)
        advance(0)
    if team.first:
        team.wait()
    training, held_out = _split(cache, config)
    images = describe_images(cache.names, training, held_out, source.labels)
    if state and state["images"] != images:
        raise DataError(f"{folder} was trained on other images or classes than {data} contains now: use --overwrite")
    check_shape(network, begun.config)
    logger.info(
        "%d training images, %d held out, %d unreadable; %s with %s on %s in %s",
        len(training),
        len(held_out),
        len(cache.failures),
        config.architecture,
        config.encoder,
        device,
        find_precision(config.precision, device),
    )
    _warn_of_absent_classes(cache, held_out, source.labels.classes)
    if team.first:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder, keep_results=state is not None)
        with replacing(folder / "config.json") as path:
            stored = config.to_dict() | {"data": str(data), "network": begun.config.to_dict()}
            path.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        with replacing(folder / "held_out.txt") as path:  # for `cloudrt tune --image-list`
            path.write_text("".join(f"{cache.names[position]}\n" for position in held_out), encoding="utf-8")
    dataset = CloudDataset(cache, training, begun.config, config.augment, config.seed)
    if config.pretrain_epochs and state is None:
        with bar("Pre-training", config.pretrain_epochs * len(dataset)) as advance:
            pretrain(network, dataset, config, device, advance)
    trainer = Trainer(config, network, dataset, device, team)
    validator = Validator(
        loss=trainer.loss,
        cache=cache,
        positions=held_out,
        batch_size=config.batch_size,
        device=device,
        autocast=trainer.autocast,
        tta=config.tta,
        scratch=folder,
    )
    return _Run(_RunInfo(folder, begun.config, begun.license, images), trainer, validator, state).run(bar)


@dataclass(frozen=True)
class _RunInfo:
    """What stays the same during a run.

    Parameters
    ----------
    folder
        The run folder.
    network
        Configuration of the network.
    license
        Source and licence of the pre-trained weights.
    images
        From `describe_images`.
    """

    folder: Path
    network: NetworkConfig
    license: str
    images: str


class _Run:
    """Trains and validates the epochs of a run and writes its files."""

    def __init__(
        self, info: _RunInfo, trainer: Trainer, validator: Validator, state: dict[str, Any] | None = None
    ) -> None:
        self.info, self.folder, self.trainer, self.validator = info, info.folder, trainer, validator
        self.config, self.team = trainer.config, trainer.team
        self.history: list[dict[str, float]] = []
        self.best_dice = -1.0
        self.done = 0
        if state:
            trainer.load_state_dict(state["trainer"])
            self.history, self.best_dice, self.done = state["history"], state["best_dice"], state["epoch"]
            logger.info("continuing after epoch %d", self.done)
        elif self.team.first:
            self._save_state(0)

    def run(self, bar: ProgressBar) -> TrainResult:
        config, trainer = self.config, self.trainer
        for epoch in range(self.done + 1, config.epochs + 1):
            if trainer.out_of_time:
                break
            rates = self._rates()
            seconds, images = trainer.seconds, trainer.images
            with bar(f"Epoch {epoch}/{config.epochs}", trainer.images_an_epoch) as advance:
                train_loss = trainer.epoch(epoch, advance)
            loss = 0.0
            if self.team.first:
                rate = (trainer.images - images) / max(trainer.seconds - seconds, 1e-9)
                loss = self._validate(epoch, train_loss, rates, rate)
            trainer.schedule.report(self.team.share(loss))
            if self.team.first:
                self._save_state(epoch)
        result = self._finish() if self.team.first else TrainResult(self.folder, 0.0, 0, 0.0, 0.0)
        self.team.wait()
        return result

    def _validate(self, epoch: int, train_loss: float, rates: tuple[float, float], rate: float) -> float:
        result = self.validator.run(self.trainer.evaluated, self.info.network)
        self._record(epoch, train_loss, result, rates, rate)
        checkpoint = self._checkpoint(result, epoch)
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
        self, epoch: int, train_loss: float, result: Validation, rates: tuple[float, float], rate: float
    ) -> None:
        row = {
            "epoch": float(epoch),
            "train_loss": train_loss,
            "valid_loss": result.loss,
            "dice": result.dice,
            "all_empty": result.all_empty,
            "encoder_lr": rates[0],
            "decoder_lr": rates[1],
            "images_per_second": rate,
            "memory_mb": memory() or 0.0,
        }
        for label, found in zip(self.info.network.labels.classes, result.found, strict=True):
            row[f"dice_{label}"] = found.dice
        self.history.append(row)
        write_history(self.history, self.folder / "history.csv")
        plot_curves(self.history, self.folder / "curves.png")
        if self.config.tensorboard:
            write_tensorboard(row, self.folder / "tensorboard")

    def _rates(self) -> tuple[float, float]:
        encoder, decoder = (group["lr"] for group in self.trainer.optimizer.param_groups)
        return float(encoder), float(decoder)

    def _checkpoint(self, result: Validation, epoch: int) -> Checkpoint:
        state = self.trainer.evaluated.state_dict()
        return Checkpoint(
            config=self.info.network,
            weights={name: value.detach().cpu().clone() for name, value in state.items()},
            rules=tuple(found.rule for found in result.found),
            dice=result.dice,
            epoch=epoch,
            history=list(self.history),
            training=self.config.to_dict(),
            weights_license=self.info.license,
        )

    def _save_state(self, epoch: int) -> None:
        values = {
            "config": self.config.to_dict(),
            "network": self.info.network.to_dict(),
            "license": self.info.license,
            "images": self.info.images,
            "trainer": self.trainer.state_dict(),
            "history": self.history,
            "best_dice": self.best_dice,
            "epoch": epoch,
        }
        write_tensors(self.folder / STATE, values)

    def _finish(self) -> TrainResult:
        """Search all rules of the best epoch, with and without subtracting no-data, and store the better ones."""
        best = Checkpoint.load(self.folder / "best.pth")
        network = self.trainer.evaluated
        network.load_state_dict(best.weights)
        config, result, gain = choose_no_data(
            lambda one: self.validator.run(network, one, final=True), self.info.network
        )
        logger.info("subtracting no-data changes the held-out Dice by %+.4f: %s", gain, "on" if gain > 0 else "off")
        rules = tuple(found.rule for found in result.found)
        final = replace(best, config=config, rules=rules, dice=result.dice, history=list(self.history))
        final.save(self.folder / "best.pth")
        if self.config.folds:
            self.validator.run(network, config, keep=self.folder / PROBABILITIES)
        (self.folder / STATE).unlink(missing_ok=True)
        return TrainResult(
            folder=self.folder,
            dice=final.dice,
            epoch=final.epoch,
            all_empty=result.all_empty,
            images_per_second=self.trainer.images / max(self.trainer.seconds, 1e-9),
        )


def _clear(folder: Path, keep_results: bool) -> None:
    """Remove, unless `keep_results`, the results of the run to overwrite."""
    if not keep_results:
        for name in ("best.pth", "last.pth", "history.csv", "curves.png", PROBABILITIES, STATE):
            (folder / name).unlink(missing_ok=True)


def _split(cache: DatasetCache, config: TrainConfig) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """Return the positions of the training and of the held-out images."""
    for name, reason in cache.failures.items():
        logger.warning("%s %s: excluded", name, reason)
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
            "no held-out image contains %s: its rule cannot be chosen; hold out more images, or use --folds",
            ", ".join(absent),
        )
