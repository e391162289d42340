"""Average several networks and several flips of the image in one graph.

    image -> each network, on all flips -> logits, flipped back -> mean -> probability -> mean over networks -> levels

The cost is one network run per member and flip: two members with all four flips run eight networks per image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cloudrt.errors import DataError
from cloudrt.masks.rule import Rule
from cloudrt.model.checkpoint import Checkpoint
from cloudrt.model.network import InferenceGraph
from cloudrt.model.network_config import VIEWS, NetworkConfig


@dataclass(frozen=True)
class Ensemble:
    """The checkpoints and the test-time augmentation of one artifact.

    Parameters
    ----------
    checkpoints
        One or more checkpoints with the same classes, grids, input size and presence output.
    digests
        SHA-256 of each checkpoint file.
    tta
        Test-time augmentation, a key of `VIEWS`.

    Raises
    ------
    DataError
        No checkpoint, the same one twice, checkpoints that do not match, or an unknown `tta`.
    """

    checkpoints: tuple[Checkpoint, ...]
    digests: tuple[str, ...] = ()
    tta: str = "none"

    def __post_init__(self) -> None:
        if self.tta not in VIEWS:
            raise DataError(f"tta must be one of {', '.join(VIEWS)}, found {self.tta!r}")
        if not self.checkpoints:
            raise DataError("an artifact needs at least one checkpoint")
        if len(set(self.digests)) < len(self.digests):
            raise DataError("an ensemble contains the same checkpoint twice: give each once")
        for member in self.checkpoints[1:]:
            self._check_member(member.config)

    def _check_member(self, other: NetworkConfig) -> None:
        ours = self.config
        if other.labels != ours.labels:
            raise DataError(f"the members of an ensemble need the same labels, found {ours.labels} and {other.labels}")
        presence = [(one.presence, one.top_k if one.presence == "top-k" else 0) for one in (ours, other)]
        if presence[0] != presence[1]:
            raise DataError(
                "the members of an ensemble need the same presence output and top_k, "
                f"found {presence[0]} and {presence[1]}"
            )
        (height, width), (other_height, other_width) = ours.input_size, other.input_size
        if (height, width) != (other_height, other_width):
            raise DataError(
                f"the members of an ensemble need the same input size, found {width}x{height} and "
                f"{other_width}x{other_height}: set one with --input-size"
            )

    @property
    def config(self) -> NetworkConfig:
        """Configuration of the first member; all members share classes, grids, input size and presence."""
        return self.checkpoints[0].config

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Rules of the first member, which were tuned on its own probability, not on the mean."""
        return self.checkpoints[0].rules

    @property
    def networks_per_image(self) -> int:
        """Number of network runs per image."""
        return len(self.checkpoints) * len(VIEWS[self.tta])

    def graph(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the module (N, H, W, 3) uint8 -> (N, C, W_out, H_out) uint8; the networks compute in `dtype`.

        With a presence output, the module returns a pair; see `InferenceGraph`.
        """
        members = [InferenceGraph(one.network().to(dtype), one.config, dtype) for one in self.checkpoints]
        return Mean(members, VIEWS[self.tta]).eval()

    def describe(self) -> list[dict[str, Any]]:
        """Return the metadata of each member, or an empty list for a single checkpoint."""
        if len(self.checkpoints) == 1:
            return []
        return [
            {"architecture": one.config.architecture, "encoder": one.config.encoder, "dice": one.dice, "sha256": digest}
            for one, digest in zip(self.checkpoints, self.digests, strict=True)
        ]


class Mean(nn.Module):
    """Mean probability of several networks; each averages its logits over the views of the image."""

    def __init__(self, members: list[InferenceGraph], views: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.views = views

    def forward(self, image: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return levels 0..255 on the transposed submission grid, and the presence levels if there are any."""
        levels = image.to(torch.float32).permute(0, 3, 1, 2)
        graphs = [member for member in self.members if isinstance(member, InferenceGraph)]
        answers = [graph.predict_probability(levels, self.views) for graph in graphs]
        probability = _mean([one for one, _ in answers])
        heads = [head for _, head in answers if head is not None]
        presence = _mean(heads) if heads else None
        return graphs[0].quantise_outputs(probability, presence)


def _mean(several: list[torch.Tensor]) -> torch.Tensor:
    return sum(several[1:], several[0]) / len(several) if len(several) > 1 else several[0]
