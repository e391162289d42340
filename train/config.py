"""The configuration of a training run, which is stored with it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from cloudrt.errors import DataError
from cloudrt.labels import CLOUDS, Grid, Labels
from cloudrt.model.network_config import PRESENCES, VIEWS

from .losses import OVERLAPS, parse_loss

SCHEDULES = ("plateau", "one-cycle", "cosine", "constant")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
OPTIMIZERS = ("radam", "adamw")
MASKS = ("all", "present")
AUGMENTATIONS = ("none", "flips", "notebook", "blur", "elastic", "strong")
TEACHER_WEIGHT = 0.5
RESUMABLE = ("epochs", "workers", "device", "compile", "time_budget", "tensorboard")
"""Fields that may change when a run is resumed; more epochs also change the learning-rate schedule."""


def default_input_size(labels: Labels) -> Grid:
    """Return the height and width, multiples of 32, of the input for the images of a data set.

    This is 640x320, as in the competition's notebook, for the competition's images. For other data, it has the shape of
    the label grid and about as many pixels or, if the grid is smaller, about the size of the grid.
    """
    if labels.label_grid == CLOUDS.label_grid:
        return 320, 640
    height, width = labels.label_grid
    scale = min(1.0, math.sqrt(320 * 640 / (height * width)))
    rows, columns = (max(32, 32 * round(side * scale / 32)) for side in (height, width))
    return rows, columns


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run. The defaults are those of the notebook, with its errors corrected.

    Parameters
    ----------
    architecture, encoder, options
        The network, by the names of segmentation_models_pytorch, and further arguments of the architecture.
    encoder_weights
        "imagenet", "none" (random initialisation), or the path of a state dict; see `weights.py`.
    init
        Checkpoint from which all weights of equal name and shape are copied, instead of `encoder_weights`; "" for none.
    input_size
        Height and width of the network's input.
    presence, top_k
        See `NetworkConfig`. A classification head is trained together with the masks.
    presence_weight
        Weight of the head's binary cross-entropy; the loss of the masks has weight 1.
    label_smoothing
        Label smoothing of the head's targets: 0.1 gives 0.05 and 0.95 instead of 0 and 1.
    teacher
        File with probabilities of the training images, from which the network learns too; "" for none. See
        `teacher.py`.
    teacher_weight
        Weight of the cross-entropy with the teacher's masks and presence; the loss on the labels has 1 minus this
        weight.
    pretrain_epochs
        Epochs of pre-training without labels, on the brightness of partly hidden images.
    epochs, batch_size, accumulate
        One optimiser step per `accumulate` batches. `batch_size` is per process.
    optimizer, encoder_lr, decoder_lr, weight_decay
        "radam" or "adamw"; `decoder_lr` applies to all parameters outside the encoder.
    schedule
        "plateau" (ReduceLROnPlateau, factor 0.3, patience 5, on the held-out loss), "one-cycle", "cosine" or
        "constant".
    loss
        Weighted sum of losses, such as "bce+dice" or "0.5*iou+dice+focal"; see `parse_loss`.
    loss_over
        "batch" computes overlaps over the whole batch; "samples" per image, then averages.
    masks
        "present" computes the overlap losses per image and class, only where the image has the class; "all" over all
        images. The pixel losses (bce, focal) and the head always use all images.
    ema
        Decay of the moving average of the weights, which is then validated and stored; 0 for none.
    freeze_batchnorm
        Whether BatchNorm normalises with its running statistics and does not update them.
    tta
        Flips of the final validation: "none", "h", "v" or "hv". Epochs are validated without flips.
    precision
        "fp32", "bf16" or "fp16" autocast. "auto" is bf16 where the device has instructions for it, otherwise fp16 on a
        GPU and fp32 on a CPU.
    held_out
        File with the names of the images to hold out, one per line; "" for a random share. With folds, these images are
        in no fold.
    validation_share
        Fraction of the images to hold out, without folds and without `held_out`.
    folds, fold
        Number of cross-validation folds, stratified by classes, and the index of the held-out one; 0 folds for none.
    group_similar
        Whether near-duplicate images are kept in one fold.
    seed
        Seed of the split, the initial weights, the order of images and the augmentation.
    augment
        One of `AUGMENTATIONS`; see `augment.py`.
    workers
        Number of data-loading processes; 0 loads in the training process.
    device
        "auto" is CUDA if available.
    compile
        Whether to use torch.compile.
    time_budget
        Seconds of training, without pre-training and validation; "one-cycle" and "cosine" are shortened to fit. 0 for
        no limit.
    tensorboard
        Whether to write TensorBoard logs.
    max_images
        Number of images to use, from the start of train.csv; 0 for all.

    Raises
    ------
    DataError
        A value out of range, or an unknown name.
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
    label_smoothing: float = 0.0
    teacher: str = ""
    teacher_weight: float = TEACHER_WEIGHT
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
    masks: str = "all"
    ema: float = 0.0
    freeze_batchnorm: bool = False
    tta: str = "none"
    precision: str = "auto"
    held_out: str = ""
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
    max_images: int = 0

    def __post_init__(self) -> None:
        names = [name for _, name in parse_loss(self.loss)]
        for name, known in (
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
            ("optimizer", OPTIMIZERS),
            ("presence", PRESENCES),
            ("loss_over", ("batch", "samples")),
            ("masks", MASKS),
            ("tta", tuple(VIEWS)),
            ("augment", AUGMENTATIONS),
        ):
            if getattr(self, name) not in known:
                raise DataError(f"{name} must be one of {', '.join(known)}, found {getattr(self, name)!r}")
        if not self.encoder_weights:
            raise DataError("encoder_weights must be imagenet, none or a file")
        if self.masks == "present" and not set(names) & set(OVERLAPS):
            raise DataError(f"masks=present needs one of the losses {', '.join(OVERLAPS)}, found {self.loss!r}")
        if self.label_smoothing and self.presence != "head":
            raise DataError("label_smoothing applies to the classification head: use it with presence=head")
        self._check_numbers()
        if not 0 < self.validation_share < 1:
            raise DataError(f"validation_share must be between 0 and 1, found {self.validation_share}")
        if not 0 <= self.label_smoothing < 1:
            raise DataError(f"label_smoothing must be at least 0 and below 1, found {self.label_smoothing}")
        if not 0 < self.teacher_weight <= 1:
            raise DataError(f"teacher_weight must be above 0 and at most 1, found {self.teacher_weight}")
        if self.teacher_weight != TEACHER_WEIGHT and not self.teacher:
            raise DataError(f"teacher_weight is {self.teacher_weight}, but no teacher is given")
        if not 0 <= self.ema < 1:
            raise DataError(f"ema must be at least 0 and below 1, found {self.ema}")
        if self.folds == 1 or self.folds < 0 or not 0 <= self.fold < max(1, self.folds):
            raise DataError(f"folds must be 0 or at least 2, and fold below it; found {self.folds} and {self.fold}")
        if self.group_similar and not self.folds:
            raise DataError("group_similar needs folds: without them, the held-out images are a random share")

    def _check_numbers(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("encoder_lr", "decoder_lr"):
            if not 0 < getattr(self, name) < 10:
                raise DataError(f"{name} must be above 0 and below 10, found {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise DataError(f"seed must be from 0 to 2^32 - 1, found {self.seed}")
        for name in ("workers", "max_images", "weight_decay", "pretrain_epochs", "time_budget", "presence_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise DataError(f"{name} must be finite and not negative, found {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON and checkpoints."""
        return asdict(self) | {"input_size": list(self.input_size)}

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Return a description of each field that differs from another run's `to_dict` but must not change on resuming.

        A field missing from `other` is compared with its default.
        """
        ours, theirs = self.to_dict(), TrainConfig().to_dict() | other
        names = [one.name for one in fields(self) if one.name not in RESUMABLE]
        return [f"{name} was {theirs[name]}, now {ours[name]}" for name in names if theirs[name] != ours[name]]
