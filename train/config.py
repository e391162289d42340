"""The configuration of a training run: one frozen dataclass, validated once, stored with the run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from cloudrt.errors import DataError
from cloudrt.labels import Grid
from cloudrt.model.network_config import PRESENCES, VIEWS

from .losses import parse_loss

SCHEDULES = ("plateau", "one-cycle", "cosine", "constant")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
OPTIMIZERS = ("radam", "adamw")
AUGMENTATIONS = ("none", "flips", "notebook", "blur", "elastic", "strong")
FREE = ("epochs", "workers", "device", "compile", "time_budget", "tensorboard")
"""What may differ when a run is resumed; more epochs also move the schedule."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run besides the data; the defaults are the notebook's where it is sound.

    Parameters
    ----------
    architecture, encoder, encoder_weights, options
        The network, by segmentation_models_pytorch's names; `encoder_weights` is "imagenet" or "none".
    init
        A checkpoint whose weights the run starts with, instead of `encoder_weights`; "" is none.
    input_size
        Height and width of the images that enter the network.
    presence, top_k
        See `NetworkConfig`; a head is trained together with the masks.
    presence_weight
        Of the head's binary cross-entropy beside the loss of the masks.
    pretrain_epochs
        Epochs before the first, without labels: the network predicts where a scene is bright, parts of it hidden.
    epochs, batch_size, accumulate
        One optimiser step every `accumulate` batches; with several processes each has batches of its own.
    optimizer, encoder_lr, decoder_lr, weight_decay
        The learning rates of the encoder and of all the rest.
    schedule
        "plateau": ReduceLROnPlateau(0.3, 5) on the validation loss; "one-cycle"; "cosine"; "constant".
    loss
        A weighted sum such as "bce+dice" or "0.5*iou+dice+focal"; see `parse_loss`.
    loss_over
        "batch" counts overlaps over the whole batch, "samples" for each image, then averages.
    ema
        Decay of the moving average of the weights that is validated and stored; 0 is without.
    freeze_batchnorm
        Whether BatchNorm keeps its statistics.
    tta
        Flips in validation: "none", "h", "v" or "hv".
    precision
        "auto" is bf16 where the GPU has it, fp16 on older ones, fp32 on a CPU.
    validation_share
        Part of the training images held out, where there are no folds.
    folds, fold
        Cross-validation: the number of folds, stratified by classes, and the one to hold out, from 0.
    group_similar
        Whether images that look nearly alike are held out together.
    seed
        Of the split, the weights, the order and the augmentation.
    augment
        Of `AUGMENTATIONS`; see `augment.py`.
    workers
        Processes that load images; 0 loads in the training process.
    device
        "auto" is CUDA when there.
    compile
        Whether torch.compile makes the network faster, after minutes of compiling.
    time_budget
        Seconds after which training ends with what it has; the schedule is squeezed into them. 0 is without.
    tensorboard
        Whether the history is also written for TensorBoard.
    limit
        Use that many images only, for a quick look; 0 is all.
    """

    architecture: str = "FPN"
    encoder: str = "se_resnext101_32x4d"
    encoder_weights: str = "imagenet"
    options: dict[str, Any] = field(default_factory=dict)
    init: str = ""
    input_size: Grid = (320, 640)
    presence: str = "none"
    top_k: int = 2000
    presence_weight: float = 0.5
    pretrain_epochs: int = 0
    epochs: int = 50
    batch_size: int = 6
    accumulate: int = 3
    optimizer: str = "radam"
    encoder_lr: float = 1e-3
    decoder_lr: float = 2e-3
    weight_decay: float = 0.0
    schedule: str = "plateau"
    loss: str = "bce+dice"
    loss_over: str = "batch"
    ema: float = 0.0
    freeze_batchnorm: bool = False
    tta: str = "none"
    precision: str = "auto"
    validation_share: float = 0.08
    folds: int = 0
    fold: int = 0
    group_similar: bool = False
    seed: int = 142
    augment: str = "notebook"
    workers: int = 0
    device: str = "auto"
    compile: bool = False
    time_budget: float = 0.0
    tensorboard: bool = False
    limit: int = 0

    def __post_init__(self) -> None:
        parse_loss(self.loss)
        for name, known in (
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
            ("optimizer", OPTIMIZERS),
            ("encoder_weights", ("imagenet", "none")),
            ("presence", PRESENCES),
            ("loss_over", ("batch", "samples")),
            ("tta", tuple(VIEWS)),
            ("augment", AUGMENTATIONS),
        ):
            if getattr(self, name) not in known:
                raise DataError(f"{name} is one of {', '.join(known)}, found {getattr(self, name)!r}")
        self._check_numbers()
        if not 0 < self.validation_share < 1:
            raise DataError(f"validation_share is between 0 and 1, found {self.validation_share}")
        if not 0 <= self.ema < 1:
            raise DataError(f"ema is a decay from 0 to below 1, found {self.ema}")
        if self.folds == 1 or self.folds < 0 or not 0 <= self.fold < max(1, self.folds):
            raise DataError(f"two folds or more, and one of them from 0: found {self.folds} and {self.fold}")

    def _check_numbers(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} is at least 1, found {getattr(self, name)}")
        for name in ("encoder_lr", "decoder_lr"):
            if not 0 < getattr(self, name) < 10:
                raise DataError(f"{name} is above 0 and below 10, found {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise DataError(f"seed is from 0 to 2^32 - 1, found {self.seed}")
        for name in ("workers", "limit", "weight_decay", "pretrain_epochs", "time_budget", "presence_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise DataError(f"{name} is a finite number, not negative, found {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints."""
        return asdict(self) | {"input_size": list(self.input_size)}

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Return, a phrase each, what of another run's `to_dict` keeps this one from going on with it."""
        ours = self.to_dict()
        names = [one.name for one in fields(self) if one.name not in FREE]
        return [f"{name} was {other.get(name)}, now {ours[name]}" for name in names if other.get(name) != ours[name]]
