"""Does the exported model give the same submission as PyTorch? Measured on images, before anything is written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cloudrt.metric import dice
from cloudrt.postprocess import Rule, apply_rules
from cloudrt.rle import rle_decode

from .ensemble import Ensemble
from .images import Compared

logger = logging.getLogger(__name__)

BATCH = 4
FEW = 16
"""With fewer images a single row decides."""
WORST = 3
"""How many of the worst images are named."""


@dataclass(frozen=True)
class Tolerances:
    """What a precision may change.

    Parameters
    ----------
    mean_difference
        Mean absolute difference of the probabilities, in levels of 1/255.
    dice
        Mean Dice between the two submissions, at least.
    empty_mismatch
        Share of rows that are empty in one submission and not in the other, at most.
    """

    mean_difference: float
    dice: float
    empty_mismatch: float = 0.005


TOLERANCES = {"fp32": Tolerances(0.05, 0.999), "fp16": Tolerances(0.5, 0.995), "int8": Tolerances(4.0, 0.98)}


@dataclass(frozen=True)
class Verdict:
    """One figure beside what is allowed; `passed` is None for a figure that is only shown."""

    figure: str
    found: str
    allowed: str
    passed: bool | None


@dataclass(frozen=True)
class Parity:
    """How far the exported model is from PyTorch in fp32, over a set of images.

    Parameters
    ----------
    images
        How many were compared.
    source
        What they are.
    max_difference, mean_difference
        Of the probabilities, in levels of 1/255.
    flipped
        Share of pixels on the other side of their class's threshold.
    dice
        Mean Dice between the two submissions, over every (image, class).
    empty_mismatch
        Share of rows empty in one submission and not in the other.
    worst
        Names of the images of the lowest Dice, worst first; without rules, of the largest mean difference.
    provider
        What ran the exported model.
    has_rules
        Whether the checkpoint has rules. Without, half of the levels is the threshold, the masks mean nothing, and the
        probabilities alone are judged.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; without the names of images, which are the user's own."""
        return {name: value for name, value in asdict(self).items() if name != "worst"}

    def verdicts(self, tolerances: Tolerances) -> list[Verdict]:
        """Return every figure beside what is allowed, those of the submissions unjudged where there are no rules."""
        return [
            Verdict(
                "mean difference, levels of 1/255",
                f"{self.mean_difference:.4f}",
                f"at most {tolerances.mean_difference:g}",
                bool(self.mean_difference <= tolerances.mean_difference),
            ),
            Verdict("largest difference, levels of 1/255", str(self.max_difference), "", None),
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

    def faults(self, tolerances: Tolerances) -> list[str]:
        """Return what is past the tolerances, a phrase each; nothing where the model passes."""
        return [
            f"{verdict.figure}: {verdict.found}, allowed {verdict.allowed}"
            for verdict in self.verdicts(tolerances)
            if verdict.passed is False
        ]


class Reference:
    """What PyTorch in fp32 says of a set of images, computed once.

    Parameters
    ----------
    ensemble
        The networks and their rules.
    compared
        The images.
    advance
        Called with the number of images done since the last call.
    """

    def __init__(self, ensemble: Ensemble, compared: Compared, advance: Callable[[int], object] | None = None) -> None:
        self.names, self.images, self.source = compared.names, compared.images, compared.source
        labels = ensemble.config.labels
        self.grid = labels.submit_grid
        self.has_rules = bool(ensemble.rules)
        self.rules = ensemble.rules or (Rule(127, 0),) * len(labels.classes)
        graph = ensemble.graph()
        levels, rows = [], []
        for begin in range(0, len(self.images), BATCH):
            with torch.inference_mode():
                levels.append(graph(torch.from_numpy(self.images[begin : begin + BATCH])).numpy())
            rows += [apply_rules(one, self.rules) for one in levels[-1]]
            if advance:
                advance(len(levels[-1]))
        self.levels, self.rows = np.concatenate(levels), rows
        if self.has_rules and not any(any(texts) for texts in rows):
            logger.warning("PyTorch finds nothing on any of these images: Dice and empty rows cannot show a difference")
        if len(rows) < FEW:
            share = 1 / (len(rows) * len(labels.classes))
            logger.warning("only %d images are compared: a single row is %.1f%% of all", len(rows), 100 * share)

    def measure(
        self,
        run: Callable[[NDArray[np.uint8]], NDArray[np.uint8]],
        provider: str = "cpu",
        give_up: Tolerances | None = None,
        advance: Callable[[int], object] | None = None,
    ) -> Parity | None:
        """Compare an exported model with PyTorch.

        Parameters
        ----------
        run
            The exported model: (N, H, W, 3) uint8 -> (N, C, W_out, H_out) uint8.
        provider
            What runs it, for the record.
        give_up
            Return None as soon as these tolerances are out of reach, whatever the images that are left give.
        advance
            Called with the number of images compared since the last call.
        """
        tally = _Tally(len(self.images), self)
        for begin in range(0, len(self.images), BATCH):
            found = run(self.images[begin : begin + BATCH])
            for position, levels in enumerate(found, start=begin):
                tally.add(position, np.ascontiguousarray(levels))
            if give_up and tally.at_best(provider).faults(give_up):
                return None
            if advance:
                advance(len(found))
        return tally.at_best(provider)

    def damage(self, run: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> float:
        """Return the mean difference on the first few images alone, in levels of 1/255."""
        return float(np.abs(run(self.images[:BATCH]).astype(np.int16) - self.levels[:BATCH]).mean())


class _Tally:
    """Sums over the images so far."""

    def __init__(self, images: int, reference: Reference) -> None:
        self.images, self.reference = images, reference
        self.thresholds = np.array([rule.threshold for rule in reference.rules])[:, None, None]
        self.largest, self.difference, self.flipped, self.mismatched = 0, 0.0, 0.0, 0
        self.scores: list[tuple[float, float, str]] = []

    def add(self, position: int, levels: NDArray[np.uint8]) -> None:
        wanted, rows = self.reference.levels[position], self.reference.rows[position]
        difference = np.abs(wanted.astype(np.int16) - levels)
        mean = float(difference.mean())
        self.largest = max(self.largest, int(difference.max()))
        self.difference += mean
        self.flipped += float(((wanted > self.thresholds) != (levels > self.thresholds)).mean())
        pairs = list(zip(rows, apply_rules(levels, self.reference.rules), strict=True))
        self.mismatched += sum(bool(one) != bool(other) for one, other in pairs)
        grid = self.reference.grid
        score = float(
            np.mean([one == other or dice(rle_decode(one, grid), rle_decode(other, grid)) for one, other in pairs])
        )
        self.scores.append((score if self.reference.has_rules else -mean, score, self.reference.names[position]))

    def at_best(self, provider: str) -> Parity:
        """Return the figures, had every image that is left no difference at all."""
        left = self.images - len(self.scores)
        best = 1.0 if self.reference.has_rules else 0.0
        return Parity(
            images=self.images,
            source=self.reference.source,
            max_difference=self.largest,
            mean_difference=self.difference / self.images,
            flipped=self.flipped / self.images,
            dice=(sum(score for _, score, _ in self.scores) + left) / self.images,
            empty_mismatch=self.mismatched / (self.images * len(self.reference.rules)),
            worst=tuple(name for key, _, name in sorted(self.scores)[:WORST] if key < best),
            provider=provider,
            has_rules=self.reference.has_rules,
        )
