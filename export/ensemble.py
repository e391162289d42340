"""Several models, several views of the image, one graph: the mean of their probabilities.

    image -> each flip of it -> each network -> probability, flipped back -> mean -> levels

A flip and a network more multiply the work: an ensemble of two with all four flips runs eight networks an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cloudrt.errors import DataError
from cloudrt.network import Checkpoint, InferenceGraph, NetworkConfig
from cloudrt.postprocess import Rule

TTA: dict[str, tuple[tuple[int, ...], ...]] = {
    "none": ((),),
    "h": ((), (3,)),
    "v": ((), (2,)),
    "hv": ((), (3,), (2,), (2, 3)),
}
"""Name -> the views: the axes of (N, C, H, W) that each is flipped along."""


@dataclass(frozen=True)
class Ensemble:
    """What one artifact is made of.

    Parameters
    ----------
    checkpoints
        One or more, of the same classes, grids and input size.
    digests
        SHA-256 of each.
    tta
        Of `TTA`.

    Raises
    ------
    DataError
        Checkpoints that do not go together; an unknown `tta`.
    """

    checkpoints: tuple[Checkpoint, ...]
    digests: tuple[str, ...] = ()
    tta: str = "none"

    def __post_init__(self) -> None:
        if self.tta not in TTA:
            raise DataError(f"tta is one of {', '.join(TTA)}, found {self.tta!r}")
        if not self.checkpoints:
            raise DataError("an artifact is made of one checkpoint at least")
        if len(set(self.digests)) < len(self.digests):
            raise DataError("an ensemble holds the same checkpoint twice: the mean would be that of fewer")
        for member in self.checkpoints[1:]:
            if member.config.labels != self.config.labels:
                raise DataError(f"an ensemble has one labels, found {self.config.labels} and {member.config.labels}")
            (height, width), (other_height, other_width) = self.config.input_size, member.config.input_size
            if (height, width) != (other_height, other_width):
                raise DataError(
                    f"an ensemble has one input size, found {width}x{height} and {other_width}x{other_height}: "
                    f"give one with --input-size"
                )

    @property
    def config(self) -> NetworkConfig:
        """The first member's configuration; classes, grids and input size are every member's."""
        return self.checkpoints[0].config

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The first member's rules: nobody has tuned any on the mean yet."""
        return self.checkpoints[0].rules

    @property
    def networks_per_image(self) -> int:
        """How often a network runs for one image."""
        return len(self.checkpoints) * len(TTA[self.tta])

    def graph(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return (N, H, W, 3) uint8 image -> (N, C, W_out, H_out) uint8 levels; the networks compute in `dtype`."""
        members = [InferenceGraph(one.network().to(dtype), one.config, dtype) for one in self.checkpoints]
        return Mean(members, TTA[self.tta]).eval()

    def describe(self) -> list[dict[str, Any]]:
        """Return what the metadata say of the members; nothing where there is but one."""
        return [
            {"architecture": one.config.architecture, "encoder": one.config.encoder, "dice": one.dice, "sha256": digest}
            for one, digest in zip(self.checkpoints, self.digests, strict=True)
            if len(self.checkpoints) > 1
        ]


class Mean(nn.Module):
    """The mean of several graphs' probabilities over several views of the image."""

    def __init__(self, members: list[InferenceGraph], views: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.views = views

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return the levels 0..255 of each class on the transposed submission grid."""
        levels = image.to(torch.float32).permute(0, 3, 1, 2)
        if len(self.views) > 1:  # one batch of all views: each network is in the graph once
            levels = torch.cat([levels.flip(view) if view else levels for view in self.views])
        members = [member.probability(levels) for member in self.members if isinstance(member, InferenceGraph)]
        mean = sum(members[1:], members[0]) / len(members) if len(members) > 1 else members[0]
        if len(self.views) > 1:
            views = mean.reshape(len(self.views), -1, *mean.shape[1:])
            mean = torch.stack([views[i].flip(view) if view else views[i] for i, view in enumerate(self.views)]).mean(0)
        return InferenceGraph.quantise(mean)
