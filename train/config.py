"""The configuration of a training run: one frozen dataclass, validated once, stored with the run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from cloudrt.errors import DataError
from cloudrt.labels import Grid

LOSSES = ("bce-dice", "bce", "dice", "focal", "iou")
SCHEDULES = ("plateau", "one-cycle", "constant")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
OPTIMIZERS = ("radam", "adamw")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run besides the data; the defaults are the notebook's where it is sound.

    Parameters
    ----------
    architecture, encoder, encoder_weights, options
        The network, by segmentation_models_pytorch's names; `encoder_weights` is "imagenet" or "none".
    input_size
        Height and width of the images that enter the network.
    epochs, batch_size, accumulate
        One optimiser step every `accumulate` batches.
    optimizer, encoder_lr, decoder_lr, weight_decay
        The learning rates of the encoder and of all the rest.
    schedule
        "plateau": ReduceLROnPlateau(0.3, 5) on the validation loss; "one-cycle"; "constant".
    loss
        "bce-dice" is the sum of both.
    precision
        "auto" is bf16 where the GPU has it, fp16 on older ones, fp32 on a CPU.
    validation_share
        Part of the training images held out.
    seed
        Of the split, the weights, the order and the augmentation.
    augment
        Whether flips, shift-scale and grid distortion are applied.
    workers
        Processes that load images; 0 loads in the training process.
    device
        "auto" is CUDA when there.
    limit
        Use that many images only, for a quick look; 0 is all.
    """

    architecture: str = "FPN"
    encoder: str = "se_resnext101_32x4d"
    encoder_weights: str = "imagenet"
    options: dict[str, Any] = field(default_factory=dict)
    input_size: Grid = (320, 640)
    epochs: int = 50
    batch_size: int = 6
    accumulate: int = 3
    optimizer: str = "radam"
    encoder_lr: float = 1e-3
    decoder_lr: float = 2e-3
    weight_decay: float = 0.0
    schedule: str = "plateau"
    loss: str = "bce-dice"
    precision: str = "auto"
    validation_share: float = 0.08
    seed: int = 142
    augment: bool = True
    workers: int = 0
    device: str = "auto"
    limit: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("loss", LOSSES),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
            ("optimizer", OPTIMIZERS),
            ("encoder_weights", ("imagenet", "none")),
        ):
            if getattr(self, name) not in known:
                raise DataError(f"{name} is one of {', '.join(known)}, found {getattr(self, name)!r}")
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} is at least 1, found {getattr(self, name)}")
        for name in ("encoder_lr", "decoder_lr"):
            if not 0 < getattr(self, name) < 10:
                raise DataError(f"{name} is above 0 and below 10, found {getattr(self, name)}")
        if not 0 < self.validation_share < 1:
            raise DataError(f"validation_share is between 0 and 1, found {self.validation_share}")
        if min(self.workers, self.limit, self.weight_decay) < 0:
            raise DataError("workers, limit and weight_decay are not negative")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints."""
        return asdict(self) | {"input_size": list(self.input_size)}
