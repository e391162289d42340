"""The content of best.pth and last.pth: weights, configuration, rules and history of a training run.

A checkpoint is read with `weights_only=True`, which unpickles only plain values and tensors, and is checked before its
weights are loaded into a network.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from cloudrt.errors import ArtifactError, DataError
from cloudrt.masks.rule import Rule
from cloudrt.model.network import build_network
from cloudrt.model.network_config import NetworkConfig
from cloudrt.system.files import is_special, replacing
from cloudrt.system.suggest import nearest_checkpoint

CHECKPOINT_FORMAT = 1


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
        Mean Dice of these rules on held-out images: those that the rules were chosen on or, in best.pth of a complete
        training, cross-validated.
    epoch
        Number of the epoch, from 1.
    history
        The rows of history.csv, one per epoch.
    training
        Configuration of the training, as plain values.
    weights_license
        Source and licence of the pre-trained weights; empty without any.

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
            values = read_tensors(path)
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
            raise ArtifactError(
                f"{path} has a format that this version cannot read; it reads format {CHECKPOINT_FORMAT}"
            )
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
            Weights that are missing, unexpected, of the wrong shape or type, or not finite; the message names the first
            one.
        DataError
            See `build_network`.
        """
        network = build_network(self.config)
        own = network.state_dict()
        expected = {name: tuple(value.shape) for name, value in own.items()}
        found = {name: tuple(value.shape) for name, value in self.weights.items()}
        faults = [f"{name} is missing" for name in expected if name not in found]
        faults += [f"{name} is unexpected" for name in found if name not in expected]
        faults += [
            f"{name} is {shape}, expected {expected[name]}"
            for name, shape in found.items()
            if name in expected and shape != expected[name]
        ]
        faults += [
            f"{name} is {value.dtype}, expected {own[name].dtype}"
            for name, value in self.weights.items()
            if name in own and value.is_floating_point() != own[name].is_floating_point()
        ]
        faults += [f"{name} contains NaN or infinity" for name, value in self.weights.items() if not is_finite(value)]
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


def read_tensors(path: str | Path) -> Any:
    """Read a file of `write_tensors`, unpickling only plain values and tensors.

    The checksums in the file are verified first, because PyTorch ignores them: damaged weights would give other masks.

    Raises
    ------
    Exception
        `OSError`, `ValueError` for a pipe, a device or a wrong checksum, or one of the exceptions of `torch.load`.
    """
    if is_special(path):
        raise ValueError(f"{path} is not a regular file")
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError) as error:
            raise ValueError(f"{path} is damaged") from error
        if damaged:
            raise ValueError(f"{damaged} in {path} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def is_finite(value: torch.Tensor) -> bool:
    """Return whether a tensor contains neither NaN nor infinity."""
    return not value.is_floating_point() or bool(torch.isfinite(value).all())
