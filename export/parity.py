"""Run PyTorch and an exported model over the same images and measure how far the submissions differ."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from cloudrt.model.parity import Parity, ParityAccumulator, ReferenceOutputs, Tolerances, default_rules

from .ensemble import Ensemble
from .images import ImageSet

logger = logging.getLogger(__name__)

BATCH = 4
Runner = Callable[[NDArray[np.uint8]], tuple[NDArray[np.uint8], NDArray[np.uint8] | None]]
"""(N, H, W, 3) uint8 RGB -> (N, C, W_out, H_out) uint8 probability, and (N, C) uint8 presence or None."""
FEW = 16
"""With fewer images, a warning states how large a part of the result one row is."""


class Reference:
    """PyTorch's outputs in fp32 for a set of images.

    Parameters
    ----------
    ensemble
        The networks and their rules.
    compared
        The images.
    advance
        Called with the number of images processed since the last call.
    """

    def __init__(self, ensemble: Ensemble, compared: ImageSet, advance: Callable[[int], object] | None = None) -> None:
        self.images = compared.images
        labels = ensemble.config.labels
        graph = ensemble.graph()
        levels: list[NDArray[np.uint8]] = []
        heads: list[NDArray[np.uint8]] = []
        for begin in range(0, len(self.images), BATCH):
            with torch.inference_mode():
                found = graph(torch.from_numpy(self.images[begin : begin + BATCH]))
            one, head = found if isinstance(found, tuple) else (found, None)
            levels.append(one.numpy())
            if head is not None:
                heads.append(head.numpy())
            if advance:
                advance(len(levels[-1]))
        self.outputs = ReferenceOutputs(
            names=compared.names,
            levels=np.concatenate(levels),
            rules=ensemble.rules or default_rules(len(labels.classes)),
            has_rules=bool(ensemble.rules),
            grid=labels.submit_grid,
            source=compared.source,
            presence=np.concatenate(heads) if heads else None,
        )
        rows = self.outputs.rows
        if ensemble.rules and not any(any(texts) for texts in rows):
            logger.warning(
                "PyTorch predicts no mask on any of these images, so Dice and empty rows hardly test the artifact: "
                "compare on other images"
            )
        if len(rows) < FEW:
            share = 1 / (len(rows) * len(labels.classes))
            logger.warning("images compared: only %d; one row is %.1f%% of the total", len(rows), 100 * share)

    def measure(
        self,
        run: Runner,
        provider: str = "cpu",
        give_up: Tolerances | None = None,
        advance: Callable[[int], object] | None = None,
    ) -> Parity | None:
        """Compare an exported model with PyTorch.

        Parameters
        ----------
        run
            Runs the exported model on a batch.
        provider
            Provider that runs it, for the record.
        give_up
            Return None as soon as the model exceeds these tolerances whatever the remaining images give.
        advance
            Called with the number of images compared since the last call.
        """
        tally = ParityAccumulator(self.outputs)
        for begin in range(0, len(self.images), BATCH):
            found, presence = run(self.images[begin : begin + BATCH])
            for row, levels in enumerate(found):
                head = None if presence is None else presence[row]
                tally.add(begin + row, np.ascontiguousarray(levels), head)
            if give_up and tally.lower_bound(provider).faults(give_up):
                return None
            if advance:
                advance(len(found))
        return tally.lower_bound(provider)

    def sensitivity(self, run: Runner) -> float:
        """Return the mean absolute difference on the first batch, in levels of 1/255."""
        return float(np.abs(run(self.images[:BATCH])[0].astype(np.int16) - self.outputs.levels[:BATCH]).mean())
