"""The network and its checkpoint, shared by training and export; the only module of the runtime that imports torch.

`build_network` builds the segmentation network by name. `InferenceGraph` adds what the artifact computes
before and after it, from a uint8 image to a uint8 probability; validation, the search of rules and parity use it.
`Checkpoint` is the content of best.pth and last.pth.
"""

from __future__ import annotations

import inspect
import logging
import pickle
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

from cloudrt.errors import ArtifactError, DataError
from cloudrt.images.image import NO_DATA_LEVEL
from cloudrt.masks.postprocess import Rule
from cloudrt.model.artifact import nearest_checkpoint
from cloudrt.model.network_config import NetworkConfig
from cloudrt.system.files import replacing
from cloudrt.system.suggest import check_name

logger = logging.getLogger(__name__)

__all__ = ["Checkpoint", "InferenceGraph", "NetworkConfig", "build_network"]

CHECKPOINT_FORMAT = 1
HEAD_DROPOUT = 0.2
RESERVED = ("encoder_name", "encoder_weights", "in_channels", "classes", "activation", "aux_params")
LARGEST_TOP_K = 3840
"""Largest k that TensorRT's TopK layer supports."""
HAS_DATA_SHARE = 0.4917
"""Smallest fraction of a neighbourhood that must have data: about half, but not a value that the mean of 25 pixels and
a resize can give exactly, because a tie would depend on rounding."""


def build_network(config: NetworkConfig) -> nn.Module:
    """Build the network with random weights: normalised images, (N, 3, H, W) float -> logits, (N, C, H, W).

    With a classification head, its output is a pair: these logits, and (N, C) logits of the presence of each class.
    Nothing is downloaded.

    Raises
    ------
    DataError
        An unknown architecture, encoder or option.
    """
    import segmentation_models_pytorch as smp

    architectures = smp.MODEL_ARCHITECTURES_MAPPING
    check_name("architecture", config.architecture.lower(), list(architectures))
    # smp ignores unknown arguments: without this check, the default would be used for a mistyped one.
    arguments = list(inspect.signature(architectures[config.architecture.lower()]).parameters)
    for option in config.options:
        if option in RESERVED:
            raise DataError(f"--set {option}: cloudrt sets this argument itself")
        check_name(f"argument of {config.architecture}", option, arguments)
    head: dict[str, Any] = {}
    if config.presence == "head":
        head = {"aux_params": {"classes": len(config.labels.classes), "dropout": HEAD_DROPOUT}}
    try:
        network = smp.create_model(
            config.architecture,
            config.encoder,
            encoder_weights=None,
            in_channels=3,
            classes=len(config.labels.classes),
            **(dict(config.options) | head),
        )
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, KeyError) and "encoder name" in str(error):
            check_name("encoder", config.encoder, list(smp.encoders.encoders))
        raise DataError(f"{config.architecture} with encoder {config.encoder} cannot be built: {error}") from error
    assert isinstance(network, nn.Module)
    return network


class InferenceGraph(nn.Module):
    """What the artifact computes: images, (N, H, W, 3) uint8 RGB -> probability, (N, C, W_out, H_out) uint8.

    With a presence output, the result is a pair: the probability, and (N, C) uint8 presence levels. The probability is
    on the transposed submission grid, so that memory order is RLE order.

    Parameters
    ----------
    network
        From `build_network`.
    config
        Its configuration.
    network_dtype
        Data type that the network computes in; the other operations are in float32.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: nn.Module, config: NetworkConfig, network_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.network = network
        self.network_dtype = network_dtype
        self.submit_grid = config.labels.submit_grid
        self.subtract_no_data = config.subtract_no_data
        self.top_k = config.top_k if config.presence == "top-k" else 0
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the output of the artifact for (N, H, W, 3) uint8 images; see the class."""
        return self.levels(*self.answers(image.to(torch.float32).permute(0, 3, 1, 2)))

    def answers(
        self, levels: torch.Tensor, views: tuple[tuple[int, ...], ...] = ((),)
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the probabilities of images on the submission grid.

        Parameters
        ----------
        levels
            (N, 3, H, W) float32, 0..255.
        views
            Test-time augmentation; see `VIEWS`. The logits are averaged over the views, before they are enlarged.

        Returns
        -------
        probability
            (N, C, H_out, W_out) float32, 0..1.
        presence
            (N, C) float32, 0..1, of the classification head; None without one.
        """
        normalised = ((levels - self.mean) / self.std).to(self.network_dtype)
        if len(views) > 1:  # all views in one batch, so that the graph contains the network once
            normalised = torch.cat([normalised.flip(view) if view else normalised for view in views])
        found = self.network(normalised)
        logits, head = found if isinstance(found, tuple) else (found, None)
        logits = logits.to(torch.float32)
        if len(views) > 1:  # flipped back and averaged at the smaller size: one resize and one sigmoid for all views
            each = logits.reshape(len(views), -1, *logits.shape[1:])
            logits = torch.stack([one.flip(view) if view else one for one, view in zip(each, views, strict=True)]).mean(
                0
            )
            head = None if head is None else head.to(torch.float32).reshape(len(views), -1, head.shape[1]).mean(0)
        # Half-pixel centres, like OpenCV's INTER_LINEAR.
        logits = functional.interpolate(logits, size=self.submit_grid, mode="bilinear", align_corners=False)
        probability = torch.sigmoid(logits)
        presence = None if head is None else torch.sigmoid(head.to(torch.float32))
        if self.subtract_no_data:
            probability = probability * self._has_data(levels)
        return probability, presence

    def levels(
        self, probability: torch.Tensor, presence: torch.Tensor | None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the output of the artifact for the result of `answers`, or for the mean of several results."""
        if self.top_k:
            presence = mean_of_highest(probability.flatten(2), self.top_k)
        levels = self.quantise(probability)
        return levels if presence is None else (levels, torch.round(presence * 255).to(torch.uint8))

    @staticmethod
    def quantise(probability: torch.Tensor) -> torch.Tensor:
        """Convert probabilities, (N, C, H_out, W_out), to levels on the transposed grid, (N, C, W_out, H_out) uint8."""
        return torch.round(probability * 255).transpose(2, 3).contiguous().to(torch.uint8)

    def _has_data(self, levels: torch.Tensor) -> torch.Tensor:
        """Return (N, 1, H_out, W_out) float32: 1 where about half of the 5x5 neighbourhood or more has data."""
        bright = (levels.amax(dim=1, keepdim=True) > NO_DATA_LEVEL).to(torch.float32)
        share = functional.avg_pool2d(bright, 5, stride=1, padding=2, count_include_pad=False)
        share = functional.interpolate(share, size=self.submit_grid, mode="bilinear", align_corners=False)
        return (share >= HAS_DATA_SHARE).to(torch.float32)


def mean_of_highest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return the mean of the `count` highest values of each map.

    If `count` is above `LARGEST_TOP_K`, the smallest of these values is found by bisection instead of sorting, with
    an error of the mean of at most about 1e-6.

    Parameters
    ----------
    values
        (N, C, P) float32, 0..1.
    count
        From 1 to P.

    Returns
    -------
    torch.Tensor
        (N, C) float32.
    """
    if count <= LARGEST_TOP_K:
        return values.topk(count).values.mean(dim=2)
    low, high = torch.zeros_like(values[..., :1]), torch.ones_like(values[..., :1])
    for _ in range(20):
        middle = (low + high) / 2
        enough = (values > middle).to(torch.float32).sum(dim=2, keepdim=True) >= count
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    above = (values > high).to(torch.float32)
    # The remaining ones of the `count` highest values are within 1e-6 of `high`.
    total = (values * above).sum(dim=2) + (count - above.sum(dim=2)) * high[..., 0]
    return total / count


@dataclass(frozen=True)
class Checkpoint:
    """The content of the checkpoints best.pth and last.pth.

    Parameters
    ----------
    config
        Configuration of the network.
    weights
        State dict of the network, on the CPU.
    rules
        One rule per class, found on held-out images; empty before the first validation.
    dice
        Mean Dice of these rules on held-out images.
    epoch
        Number of the epoch, from 1.
    history
        The rows of history.csv, one per epoch.
    training
        Configuration of the training, as plain values.
    weights_license
        Licence of the pre-trained weights.

    Raises
    ------
    DataError
        A value of the wrong type or out of range.
    """

    config: NetworkConfig
    weights: dict[str, torch.Tensor]
    rules: tuple[Rule, ...]
    dice: float
    epoch: int
    history: list[dict[str, float]] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    weights_license: str = ""

    def save(self, path: Path) -> None:
        """Write the checkpoint atomically."""
        values = {
            "format": CHECKPOINT_FORMAT,
            "config": self.config.to_dict(),
            "rules": [rule.to_dict() for rule in self.rules],
            "weights": self.weights,
        }
        others = ("dice", "epoch", "history", "training", "weights_license")
        write_tensors(path, values | {name: getattr(self, name) for name in others})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a checkpoint, unpickling only plain values and tensors.

        Raises
        ------
        ArtifactError
            A missing file, a file that is not a checkpoint of cloudrt, or a checkpoint of another format.
        """
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            near = nearest_checkpoint(path)
            hint = f"did you mean {near}?" if near else "train one with cloudrt-train"
            raise ArtifactError(f"{path} is missing: {hint}") from None
        except IsADirectoryError:
            raise ArtifactError(f"{path} is a folder: give a checkpoint in it, such as best.pth") from None
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
            raise ArtifactError(f"{path} is not a checkpoint, or is damaged") from error
        if not isinstance(values, dict) or "config" not in values or not isinstance(values.get("weights"), dict):
            raise ArtifactError(f"{path} was not written by cloudrt-train")
        if values.pop("format", None) != CHECKPOINT_FORMAT:
            raise ArtifactError(f"{path} has a format that this version cannot read; it reads {CHECKPOINT_FORMAT}")
        try:
            return cls(
                **values
                | {
                    "config": NetworkConfig.from_dict(values["config"]),
                    "rules": tuple(Rule.from_dict(rule) for rule in values["rules"] or ()),
                }
            )
        except (TypeError, KeyError, DataError) as error:
            raise ArtifactError(f"{path} was not written by this version of cloudrt-train: {error}") from error

    def __post_init__(self) -> None:
        faults = {
            f"{len(self.rules)} rules for {len(self.config.labels.classes)} classes": len(self.rules)
            not in (0, len(self.config.labels.classes)),
            f"Dice {self.dice!r} is not a number from 0 to 1": not isinstance(self.dice, int | float)
            or not 0 <= self.dice <= 1,
            f"epoch {self.epoch!r} is not a whole number": not isinstance(self.epoch, int),
            "the history is not a list": not isinstance(self.history, list),
            "the configuration of the training is not a dictionary": not isinstance(self.training, dict),
            "the licence is not a string": not isinstance(self.weights_license, str),
            "the weights are not tensors": not all(isinstance(value, torch.Tensor) for value in self.weights.values()),
        }
        for fault, found in faults.items():
            if found:
                raise DataError(fault)

    def network(self) -> nn.Module:
        """Build the network with these weights, in evaluation mode.

        Raises
        ------
        ArtifactError
            Weights that are missing, unexpected, of the wrong shape or not finite; the message names the first one.
        """
        network = build_network(self.config)
        expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in self.weights.items()}
        faults = [f"{name} is missing" for name in expected if name not in found]
        faults += [f"{name} is unexpected" for name in found if name not in expected]
        faults += [
            f"{name} is {shape}, expected {expected[name]}"
            for name, shape in found.items()
            if name in expected and shape != expected[name]
        ]
        faults += [f"{name} contains NaN or infinity" for name, value in self.weights.items() if not _finite(value)]
        if faults:
            more = f" ({len(faults)} such errors)" if len(faults) > 1 else ""
            raise ArtifactError(
                f"the checkpoint's weights do not fit {self.config.architecture} with {self.config.encoder}: "
                f"{faults[0]}{more}"
            )
        network.load_state_dict(self.weights)
        return network.eval()


def write_tensors(path: Path, values: dict[str, Any]) -> None:
    """Write plain values and tensors atomically. On a full disk, this raises OSError, unlike torch.save to a path."""
    content = BytesIO()
    torch.save(values, content)
    with replacing(path) as partial:
        partial.write_bytes(content.getbuffer())


def _finite(value: torch.Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())
