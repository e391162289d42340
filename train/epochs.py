"""The epochs of a run: training, validation, and the files that are written after each.

After each epoch, the network is validated with the competition's Dice on the submission grid, and the checkpoints, the
state and the history are written. At the end, the rules of the best epoch are searched on all thresholds and stored in
best.pth.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cloudrt.errors import DataError
from cloudrt.model.checkpoint import Checkpoint, write_tensors
from cloudrt.model.network_config import NetworkConfig
from cloudrt.system.progress import ProgressBar
from cloudrt.system.statistics import memory

from .curves import plot_curves, write_history, write_tensorboard
from .run_files import PROBABILITIES, STATE, TENSORBOARD
from .trainer import Trainer
from .validate import Validation, Validator, choose_no_data

logger = logging.getLogger(__name__)


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
        Number of the best epoch. In processes other than rank 0, all numbers are 0.
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


@dataclass(frozen=True)
class RunInfo:
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
        Digest of the images and classes, from `describe_images`.
    """

    folder: Path
    network: NetworkConfig
    license: str
    images: str


class Run:
    """Trains and validates the epochs of a run and writes its files.

    Parameters
    ----------
    info
        What stays the same during the run.
    trainer, validator
        The training and the validation.
    state
        The state of the run to continue, from `read_state`; None for a new run.

    Raises
    ------
    DataError
        The state does not fit the network or the optimiser.
    """

    def __init__(
        self, info: RunInfo, trainer: Trainer, validator: Validator, state: dict[str, Any] | None = None
    ) -> None:
        self.info, self.folder, self.trainer, self.validator = info, info.folder, trainer, validator
        self.config, self.group = trainer.config, trainer.group
        self.history: list[dict[str, float]] = []
        self.best_dice = -1.0
        self.done = 0
        if state:
            try:
                trainer.load_state_dict(state["trainer"])
            except torch.OutOfMemoryError:  # the state is sound
                raise
            except (RuntimeError, TypeError, KeyError, ValueError, AttributeError) as error:
                raise DataError(f"{self.folder / STATE} does not fit this training: use --overwrite") from error
            self.history, self.best_dice, self.done = state["history"], state["best_dice"], state["epoch"]
            logger.info("continuing: %d of %d epochs are complete", self.done, self.config.epochs)
        elif self.group.first:
            self._save_state(0)

    def run(self, bar: ProgressBar) -> TrainResult:
        """Train and validate the remaining epochs, then find the rules of the best one."""
        config, trainer = self.config, self.trainer
        for epoch in range(self.done + 1, config.epochs + 1):
            if trainer.out_of_time:
                break
            rates = self._rates()
            seconds, images = trainer.seconds, trainer.images
            with bar(f"Epoch {epoch}/{config.epochs}", trainer.images_per_epoch) as advance:
                train_loss = trainer.epoch(epoch, advance)
            loss = 0.0
            if self.group.first:
                rate = (trainer.images - images) / max(trainer.seconds - seconds, 1e-9)
                loss = self._validate(epoch, train_loss, rates, rate)
            trainer.schedule.report(self.group.broadcast(loss))
            if self.group.first:
                self._save_state(epoch)
        result = self._finish() if self.group.first else TrainResult(self.folder, 0.0, 0, 0.0, 0.0)
        self.group.barrier()
        return result

    def _validate(self, epoch: int, train_loss: float, rates: tuple[float, float], rate: float) -> float:
        result = self.validator.run(self.trainer.eval_network, self.info.network)
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
            write_tensorboard(row, self.folder / TENSORBOARD)

    def _rates(self) -> tuple[float, float]:
        encoder, decoder = (group["lr"] for group in self.trainer.optimizer.param_groups)
        return float(encoder), float(decoder)

    def _checkpoint(self, result: Validation, epoch: int) -> Checkpoint:
        state = self.trainer.eval_network.state_dict()
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
        """Choose the rules of the best epoch, and whether no-data is subtracted (see `choose_no_data`); store both."""
        best = Checkpoint.load(self.folder / "best.pth")
        network = self.trainer.eval_network
        network.load_state_dict(best.weights)
        config, result, gain = choose_no_data(
            lambda one: self.validator.run(network, one, final=True), self.info.network
        )
        logger.info(
            "a probability of zero where the image has no data changes the held-out Dice by %+.4f: %s",
            gain,
            "used" if gain > 0 else "not used",
        )
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
