"""Does the exported model give the same submission as PyTorch? Measured on images, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cloudrt.metric import dice
from cloudrt.postprocess import Rule, apply_rules
from cloudrt.rle import rle_decode

from .ensemble import Ensemble


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


TOLERANCES = {"fp32": Tolerances(0.05, 0.999), "fp16": Tolerances(0.5, 0.995)}


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
        Names of the images of the lowest Dice, worst first.
    """

    images: int
    source: str
    max_difference: int
    mean_difference: float
    flipped: float
    dice: float
    empty_mismatch: float
    worst: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; without the names of images, which are the user's own."""
        return {name: value for name, value in asdict(self).items() if name != "worst"}

    def faults(self, tolerances: Tolerances) -> list[str]:
        """Return what is past the tolerances, a sentence each; nothing where the model passes."""
        faults = []
        if not self.mean_difference <= tolerances.mean_difference:
            faults.append(
                f"mean difference {self.mean_difference:.3f} levels is more than {tolerances.mean_difference:g}"
            )
        if not self.dice >= tolerances.dice:
            faults.append(f"Dice between the submissions {self.dice:.4f} is less than {tolerances.dice:g}")
        if not self.empty_mismatch <= tolerances.empty_mismatch:
            faults.append(
                f"{self.empty_mismatch:.2%} of rows are empty in one submission only, more than "
                f"{tolerances.empty_mismatch:.2%}"
            )
        return faults


def measure_parity(
    ensemble: Ensemble,
    run: Callable[[NDArray[np.uint8]], NDArray[np.uint8]],
    images: Sequence[tuple[str, NDArray[np.uint8]]],
    source: str,
    batch_size: int = 4,
    advance: Callable[[int], object] | None = None,
) -> Parity:
    """Compare an exported model with PyTorch in fp32.

    Parameters
    ----------
    ensemble
        The networks and their rules; without rules, half of the levels is the threshold.
    run
        The exported model: (N, H, W, 3) uint8 -> (N, C, W_out, H_out) uint8.
    images
        (name, (H, W, 3) uint8 RGB image of the input size).
    source
        What the images are, for the record.
    """
    graph = ensemble.graph()
    labels = ensemble.config.labels
    grid = labels.submit_grid
    rules = ensemble.rules or (Rule(127, 0),) * len(labels.classes)
    thresholds = np.array([rule.threshold for rule in rules])[:, None, None]
    largest, total, flipped, mismatched = 0, 0.0, 0.0, 0
    scores: list[tuple[float, str]] = []
    for begin in range(0, len(images), batch_size):
        chosen = images[begin : begin + batch_size]
        batch = np.stack([image for _, image in chosen])
        with torch.inference_mode():
            wanted = graph(torch.from_numpy(batch)).numpy()
        found = run(batch)
        for (name, _), a, b in zip(chosen, wanted, found, strict=True):
            difference = np.abs(a.astype(np.int16) - b)
            largest = max(largest, int(difference.max()))
            total += float(difference.mean())
            flipped += float(((a > thresholds) != (b > thresholds)).mean())
            rows = list(zip(apply_rules(a, rules), apply_rules(np.ascontiguousarray(b), rules), strict=True))
            mismatched += sum(bool(one) != bool(other) for one, other in rows)
            scores.append((float(np.mean([dice(rle_decode(s, grid), rle_decode(t, grid)) for s, t in rows])), name))
        if advance:
            advance(len(chosen))
    count = len(images)
    return Parity(
        images=count,
        source=source,
        max_difference=largest,
        mean_difference=total / count,
        flipped=flipped / count,
        dice=float(np.mean([score for score, _ in scores])),
        empty_mismatch=mismatched / (count * len(rules)),
        worst=tuple(name for score, name in sorted(scores)[:3] if score < 1),
    )
