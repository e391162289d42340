"""Comparison of two models by their probabilities and by the submissions computed from them.

Export compares an exported model with PyTorch; `auto` compares a provider with ONNX Runtime's CPU provider in fp32.
`TOLERANCES` are the limits for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloudrt.labels import Grid
from cloudrt.masks.metric import dice
from cloudrt.masks.postprocess import apply_rules
from cloudrt.masks.rle import rle_decode
from cloudrt.masks.rule import Rule

WORST = 3
"""Number of images with the lowest Dice that are reported."""


@dataclass(frozen=True)
class Tolerances:
    """Limits of the difference between a model and its reference.

    Parameters
    ----------
    mean_difference
        Largest mean absolute difference of the probabilities, in levels of 1/255.
    dice
        Smallest mean Dice between the two submissions.
    empty_mismatch
        Largest fraction of rows that are empty in one submission and not in the other.
    """

    mean_difference: float
    dice: float
    empty_mismatch: float = 0.005


TOLERANCES = {
    "fp32": Tolerances(0.05, 0.995),
    "fp16": Tolerances(0.5, 0.995),
    "bf16": Tolerances(4.0, 0.98),
    "int8": Tolerances(4.0, 0.98),
}


@dataclass(frozen=True)
class Verdict:
    """A figure and its limit, as texts; `passed` is None for figures without a limit."""

    figure: str
    found: str
    allowed: str
    passed: bool | None


@dataclass(frozen=True)
class Parity:
    """Difference between a model and its reference on a set of images.

    Parameters
    ----------
    images
        Number of images compared.
    source
        Description of the images.
    max_difference, mean_difference
        Absolute difference of the probabilities, in levels of 1/255; `max_difference` includes the presence levels.
    flipped
        Fraction of pixels that are above the threshold of their class in one model and not in the other.
    dice
        Mean Dice between the two submissions, over all (image, class) pairs.
    empty_mismatch
        Fraction of rows that are empty in one submission and not in the other.
    worst
        Names of the images with the lowest Dice, lowest first; without rules, with the largest mean difference.
    provider
        Provider that ran the model.
    has_rules
        Whether the model has rules. Without rules, the masks (threshold 127) are not meaningful, and only the
        probabilities are compared with the limits.
    presence_difference
        Mean absolute difference of the presence levels; None without such an output.
    """

    images: int
    source: str
    max_difference: int
    mean_difference: float
    flipped: float
    dice: float
    empty_mismatch: float
    worst: tuple[str, ...] = ()
    provider: str = "cpu"
    has_rules: bool = True
    presence_difference: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; without names of images, which may be private."""
        return {name: value for name, value in asdict(self).items() if name != "worst"}

    def verdicts(self, tolerances: Tolerances) -> list[Verdict]:
        """Return all figures and their limits; without rules, the figures of the submissions have no limit."""
        return [
            Verdict(
                "mean difference, levels of 1/255",
                f"{self.mean_difference:.4f}",
                f"at most {tolerances.mean_difference:g}",
                bool(self.mean_difference <= tolerances.mean_difference),
            ),
            Verdict("largest difference, levels of 1/255", str(self.max_difference), "", None),
            *self._presence_verdict(tolerances),
            Verdict("pixels across their threshold", f"{self.flipped:.4%}", "", None),
            Verdict(
                "Dice between the submissions",
                f"{self.dice:.5f}",
                f"at least {tolerances.dice:g}",
                bool(self.dice >= tolerances.dice) if self.has_rules else None,
            ),
            Verdict(
                "rows empty in one submission only",
                f"{self.empty_mismatch:.2%}",
                f"at most {tolerances.empty_mismatch:.2%}",
                bool(self.empty_mismatch <= tolerances.empty_mismatch) if self.has_rules else None,
            ),
        ]

    def _presence_verdict(self, tolerances: Tolerances) -> list[Verdict]:
        if self.presence_difference is None:
            return []
        return [
            Verdict(
                "mean difference of presence, levels of 1/255",
                f"{self.presence_difference:.4f}",
                f"at most {tolerances.mean_difference:g}",
                bool(self.presence_difference <= tolerances.mean_difference),
            )
        ]

    def faults(self, tolerances: Tolerances) -> list[str]:
        """Return a phrase for each limit that is violated; an empty list if the model passes."""
        return [
            f"{verdict.figure}: {verdict.found}, allowed {verdict.allowed}"
            for verdict in self.verdicts(tolerances)
            if verdict.passed is False
        ]


@dataclass(frozen=True)
class ReferenceOutputs:
    """Outputs of the reference for a set of images.

    Parameters
    ----------
    names
        Names of the images.
    levels
        (N, C, W, H) uint8 probability levels on the transposed submission grid.
    rules
        One rule per class; see `default_rules`.
    has_rules
        See `Parity`.
    grid
        The submission grid.
    source
        Description of the images.
    presence
        (N, C) uint8 presence levels, if the model has that output.
    """

    names: Sequence[str]
    levels: NDArray[np.uint8]
    rules: tuple[Rule, ...]
    has_rules: bool
    grid: Grid
    source: str = ""
    presence: NDArray[np.uint8] | None = None

    @property
    def rows(self) -> list[list[str]]:
        """RLE texts: for each image, one per class."""
        presence = [None] * len(self.levels) if self.presence is None else list(self.presence)
        return [apply_rules(one, self.rules, head) for one, head in zip(self.levels, presence, strict=True)]


def default_rules(classes: int) -> tuple[Rule, ...]:
    """Return rules for a model without rules: threshold 127 (a probability of one half), no min area."""
    return (Rule(127, 0),) * classes


class ParityAccumulator:
    """Compares the outputs of a model with those of the reference, image by image, and accumulates the differences.

    Parameters
    ----------
    outputs
        Outputs of the reference.
    """

    def __init__(self, outputs: ReferenceOutputs) -> None:
        self.outputs, self.rows = outputs, outputs.rows
        self.thresholds = np.array([rule.threshold for rule in outputs.rules])[:, None, None]
        self.largest, self.difference, self.flipped, self.mismatched = 0, 0.0, 0.0, 0
        self.presence_difference = 0.0
        self.scores: list[tuple[float, float, str]] = []

    def add(self, position: int, levels: NDArray[np.uint8], presence: NDArray[np.uint8] | None = None) -> None:
        """Compare the (C, W, H) uint8 levels, and (C,) uint8 presence, of the image at `position`."""
        outputs = self.outputs
        wanted, rows = outputs.levels[position], self.rows[position]
        difference = np.abs(wanted.astype(np.int16) - levels)
        mean = float(difference.mean())
        self.largest = max(self.largest, int(difference.max()))
        self.difference += mean
        if presence is not None and outputs.presence is not None:
            apart = np.abs(outputs.presence[position].astype(np.int16) - presence)
            self.largest = max(self.largest, int(apart.max()))
            self.presence_difference += float(apart.mean())
        self.flipped += float(((wanted > self.thresholds) != (levels > self.thresholds)).mean())
        pairs = list(zip(rows, apply_rules(levels, outputs.rules, presence), strict=True))
        self.mismatched += sum(bool(one) != bool(other) for one, other in pairs)
        grid = outputs.grid
        score = float(
            np.mean([one == other or dice(rle_decode(one, grid), rle_decode(other, grid)) for one, other in pairs])
        )
        self.scores.append((score if outputs.has_rules else -mean, score, outputs.names[position]))

    def lower_bound(self, provider: str) -> Parity:
        """Return the figures, assuming that the images not compared yet are equal: a lower bound of the difference."""
        outputs, images = self.outputs, len(self.outputs.levels)
        left = images - len(self.scores)
        best = 1.0 if outputs.has_rules else 0.0
        return Parity(
            images=images,
            source=outputs.source,
            max_difference=self.largest,
            mean_difference=self.difference / images,
            flipped=self.flipped / images,
            dice=(sum(score for _, score, _ in self.scores) + left) / images,
            empty_mismatch=self.mismatched / (images * len(outputs.rules)),
            worst=tuple(name for key, _, name in sorted(self.scores)[:WORST] if key < best),
            provider=provider,
            has_rules=outputs.has_rules,
            presence_difference=None if outputs.presence is None else self.presence_difference / images,
        )
