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
from cloudrt.masks.postprocess import Rule
from cloudrt.model.network import Checkpoint, InferenceGraph, NetworkConfig
from cloudrt.model.network_config import VIEWS


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
        Of `VIEWS`.

    Raises
    ------
    DataError
        Checkpoints that do not go together; an unknown `tta`.
    """

    checkpoints: tuple[Checkpoint, ...]
    digests: tuple[str, ...] = ()
    tta: str = "none"

    def __post_init__(self) -> None:
        if self.tta not in VIEWS:
            raise DataError(f"tta is one of {', '.join(VIEWS)}, found {self.tta!r}")
        if not self.checkpoints:
            raise DataError("an artifact is made of one checkpoint at least")
        if len(set(self.digests)) < len(self.digests):
            raise DataError("an ensemble holds the same checkpoint twice: the mean would be that of fewer")
        for member in self.checkpoints[1:]:
            if member.config.labels != self.config.labels:
                raise DataError(f"an ensemble has one labels, found {self.config.labels} and {member.config.labels}")
            ours, theirs = (
                (one.config.presence, one.config.top_k if one.config.presence == "top-k" else 0)
                for one in (self.checkpoints[0], member)
            )
            if ours != theirs:
                raise DataError(f"an ensemble has one presence, found {ours[0]} and {theirs[0]}, or another top_k")
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
        return len(self.checkpoints) * len(VIEWS[self.tta])

    def graph(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return (N, H, W, 3) uint8 image -> (N, C, W_out, H_out) uint8 levels; the networks compute in `dtype`."""
        members = [InferenceGraph(one.network().to(dtype), one.config, dtype) for one in self.checkpoints]
        return Mean(members, VIEWS[self.tta]).eval()

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

    def forward(self, image: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the levels 0..255 of each class on the transposed submission grid; with presence, those too."""
        levels = image.to(torch.float32).permute(0, 3, 1, 2)
        graphs = [member for member in self.members if isinstance(member, InferenceGraph)]
        answers = [graph.answers(levels, self.views) for graph in graphs]
        probability = _mean([one for one, _ in answers])
        heads = [head for _, head in answers if head is not None]
        presence = _mean(heads) if heads else None
        return graphs[0].levels(probability, presence)


def _mean(several: list[torch.Tensor]) -> torch.Tensor:
    return sum(several[1:], several[0]) / len(several) if len(several) > 1 else several[0]
