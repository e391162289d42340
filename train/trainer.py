"""The training of a network: steps, epochs, and the state from which an interrupted run continues exactly."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from cloudrt.errors import DataError

from .config import TrainConfig
from .dataset import CloudDataset, EpochBatches, Feed
from .distributed import Processes
from .losses import RunningLoss, build_loss
from .optimise import Schedule, build_autocast, build_average, build_optimizer, load_optimizer

NAMED = 3
"""Number of images to name when the loss of a batch is not finite."""


class Trainer:
    """Trains a network: batches, optimiser, schedule, and the moving average of the weights.

    Parameters
    ----------
    config
        The options of the run.
    network
        The network, on `device`.
    dataset
        The training images.
    device
        The device.
    group
        The process group.
    """

    def __init__(
        self, config: TrainConfig, network: nn.Module, dataset: CloudDataset, device: torch.device, group: Processes
    ) -> None:
        self.config, self.network, self.dataset, self.device, self.group = config, network, dataset, device, group
        self.batches = EpochBatches(len(dataset), config.batch_size, config.seed, group.rank, group.world_size)
        self.loader = DataLoader(
            dataset, batch_sampler=self.batches, num_workers=config.workers, pin_memory=device.type == "cuda"
        )
        self.feed = Feed(dataset.config, device)
        self.loss = build_loss(config.loss, config.loss_over, config.masks).to(device)
        self.optimizer = build_optimizer(network, config)
        self.schedule = Schedule(self.optimizer, config)
        self.average = build_average(network, config.ema)
        self.autocast, scaled = build_autocast(config.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.steps = 0
        self.seconds = 0.0
        self.images = 0
        self._wrapped = group.wrap(network, device)
        self._forward: Callable[[torch.Tensor], Any] = torch.compile(self._wrapped) if config.compile else self._wrapped

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimiser steps per epoch."""
        return -(-len(self.batches) // self.config.accumulate)

    @property
    def images_per_epoch(self) -> int:
        """Number of images per epoch, over all processes."""
        return len(self.batches) * self.batches.batch_size * self.group.world_size

    @property
    def eval_network(self) -> nn.Module:
        """The network to validate and store: the moving average if there is one."""
        if self.average is None:
            return self.network
        module: nn.Module = self.average.module
        return module

    @property
    def out_of_time(self) -> bool:
        """Whether the time budget is used up."""
        return bool(self.config.time_budget) and self.seconds >= self.config.time_budget

    def epoch(self, number: int, advance: Callable[..., object]) -> float:
        """Train one epoch, or until the time budget is used up, and return the mean loss of this process's batches.

        Raises
        ------
        DataError
            A loss that is not finite; the message names images of the batch.
        """
        self.dataset.epoch = self.batches.epoch = number
        self.network.train()
        if self.config.freeze_batchnorm:
            for module in self.network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        losses, batches = RunningLoss(), len(self.batches)
        began, before = time.perf_counter(), self.seconds
        for position, (image, *targets) in enumerate(self.loader, start=1):
            last = position == batches or position % self.config.accumulate == 0
            self._check(losses.add(self._batch(image, targets, position, last)))
            if last:
                self.seconds = self._agreed(before + time.perf_counter() - began)
            advance(len(image) * self.group.world_size, loss=losses.mean)
            self.images += len(image) * self.group.world_size
            if last and self.out_of_time:
                break
        self._check(losses.read())  # waits for the device
        self.seconds = self._agreed(before + time.perf_counter() - began)
        return losses.mean

    def _batch(self, image: torch.Tensor, targets: list[torch.Tensor], position: int, last: bool) -> torch.Tensor:
        """Add the gradients of a batch, take a step if it is the `last` of the accumulated batches; return the loss."""
        mask, *taught = targets
        pixels, truth = self.feed(image, mask)
        # Gradients are exchanged only before an optimiser step.
        apart = isinstance(self._wrapped, nn.parallel.DistributedDataParallel) and not last
        with self._wrapped.no_sync() if apart else nullcontext():  # type: ignore[operator]
            try:
                with self.autocast():
                    found = self._forward(pixels)
            except ValueError as error:  # BatchNorm of one value per channel
                raise DataError(f"the network cannot train on a batch of {len(pixels)}: {error}") from error
            logits, head = found if isinstance(found, tuple) else (found, None)
            smoothing = self.config.label_smoothing
            present = truth.amax(dim=(2, 3)) * (1 - smoothing) + smoothing / 2
            loss = self._with_head(self.loss(logits.float(), truth), head, present)
            if taught:
                levels, presence = (one.to(self.device, non_blocking=True) / 255 for one in taught)
                distilled = functional.binary_cross_entropy_with_logits(logits.float(), levels)
                share = self.config.teacher_weight
                loss = (1 - share) * loss + share * self._with_head(distilled, head, presence)
            torch.autograd.backward(self.scaler.scale(loss / self._accumulated(position)))
        if last:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            self.steps += 1
            if self.average is not None:
                self.average.update_parameters(self.network)
            self.schedule.progress(self._progress())
        return loss

    def _with_head(self, loss: torch.Tensor, head: torch.Tensor | None, present: torch.Tensor) -> torch.Tensor:
        """Return the loss of the masks plus the weighted loss of the classification head, if there is one."""
        if head is None:
            return loss
        return loss + self.config.presence_weight * functional.binary_cross_entropy_with_logits(head.float(), present)

    def _agreed(self, seconds: float) -> float:
        """Return the time of rank 0 if a time budget depends on it, so that all processes stop together."""
        return self.group.broadcast(seconds) if self.config.time_budget else seconds

    def _progress(self) -> float:
        done = self.steps / (self.config.epochs * self.steps_per_epoch)
        return max(done, self.seconds / self.config.time_budget) if self.config.time_budget else done

    def _accumulated(self, position: int) -> int:
        """Return the number of batches in the optimiser step of batch `position`; the last group may be smaller."""
        batches, accumulate = len(self.batches), self.config.accumulate
        last_group = batches - batches % accumulate
        return batches % accumulate if position > last_group else accumulate

    def _check(self, bad: tuple[int, float] | None) -> None:
        """Raise DataError if the loss of a batch is not finite."""
        if bad is None:
            return
        position, value = bad
        indices = list(self.batches)[position - 1]
        names = [self.dataset.cache.names[int(self.dataset.positions[index])] for index in indices]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise DataError(
            f"the loss is {value} at epoch {self.batches.epoch}, batch {position} ({', '.join(names[:NAMED])}{more}): "
            "lower the learning rates or use --precision fp32; the checkpoints of earlier epochs are kept"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next epoch depends on, as tensors and plain values."""
        return {
            "network": self.network.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "steps": self.steps,
            "seconds": self.seconds,
            "images": self.images,
            "random": torch.get_rng_state(),
            "random_gpu": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state.

        Raises
        ------
        Exception
            `RuntimeError`, `TypeError`, `KeyError`, `ValueError` or `AttributeError`: the state is of another training.
        """
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.steps, self.seconds, self.images = int(state["steps"]), float(state["seconds"]), int(state["images"])
        torch.set_rng_state(state["random"])
        if state["random_gpu"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_gpu"], self.device)
        self.schedule.progress(self._progress())
