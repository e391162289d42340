"""The output of the pipeline's engine stage: groups of decoded inputs with the network's outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cloudrt.images.decoding import Decoded
from cloudrt.model.inferred import Inferred


class BatchOutput(NamedTuple):
    """The network's outputs for one batch.

    Parameters
    ----------
    rows
        Its rows in the group.
    size
        Batch size of the engine; the last batch of a run may have fewer rows.
    probability, presence
        (n, C, W, H) and (n, C) uint8; None if every input failed, or the artifact has no such output.
    """

    rows: range
    size: int
    probability: NDArray[np.uint8] | None = None
    presence: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Group:
    """Consecutive inputs, decoded, and the network's outputs for them, in order."""

    decoded: Decoded
    batches: list[BatchOutput] = field(default_factory=list)

    def each(self) -> Iterator[Inferred]:
        """Yield the outputs for each input."""
        decoded = self.decoded
        for batch in self.batches:
            for position, row in enumerate(batch.rows):
                error = decoded.errors.get(row)
                sound = error is None and batch.probability is not None
                yield Inferred(
                    image=decoded.keys[row],
                    probability=batch.probability[position] if sound and batch.probability is not None else None,
                    presence=batch.presence[position] if sound and batch.presence is not None else None,
                    error=error,
                    batch=decoded.number + batch.rows.start,
                    batch_size=batch.size,
                )
