"""The engine stage of the pipeline: an engine runs the batches of each group of decoded inputs.

`infer_group` runs on the engine threads of `Segmenter`; a thread runs the batches of one group on one engine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cloudrt.engines.pool import EnginePool
from cloudrt.errors import MemoryExhausted
from cloudrt.images.decoding import Decoded
from cloudrt.model.inferred import Inferred
from cloudrt.system.statistics import StageStats


class BatchOutput(NamedTuple):
    """The network's outputs for one batch.

    Parameters
    ----------
    rows
        Its rows in the group.
    size
        Batch size of the engine; the last batch of a group may have fewer rows.
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


def infer_group(pool: EnginePool, stats: StageStats, decoded: Decoded) -> Group:
    """Run the batches of a group, with a smaller batch size after running out of memory.

    Parameters
    ----------
    pool
        The engines.
    stats
        The duration of each batch is added to it.
    decoded
        The inputs of the group.

    Raises
    ------
    CloudrtError
        An engine failed, or there is not enough memory for a batch of one image.
    """
    group = Group(decoded)
    done, count = 0, len(decoded.keys)
    while done < count:
        size = pool.batch_size
        try:
            _run_batches(pool, stats, group, done, size)
            break
        except MemoryExhausted as reason:
            pool.step_down(size, reason)
            done = group.batches[-1].rows.stop if group.batches else 0
    return group


def _run_batches(pool: EnginePool, stats: StageStats, group: Group, begin: int, size: int) -> None:
    """Run the batches of a group from row `begin` on, and append their outputs to it."""
    decoded, times, done = group.decoded, list[float](), group.batches
    errors, images, count = decoded.errors, decoded.images, len(decoded.keys)
    batches = [range(row, row + size) for row in range(begin, count - size + 1, size)]
    if rest := (count - begin) % size:
        batches.append(range(count - rest, count))
    failed = [rows for rows in batches if all(row in errors for row in rows)] if errors else ()
    sound = [rows for rows in batches if rows not in failed] if failed else batches
    try:
        with closing(pool.run_each([images[rows.start : rows.stop] for rows in sound])) as outputs:
            for rows in batches:
                if failed and rows in failed:
                    done.append(BatchOutput(rows, size))
                    continue
                began = time.perf_counter()
                probability, presence = next(outputs)
                times.append(time.perf_counter() - began)
                done.append(BatchOutput(rows, size, probability, presence))
    finally:
        stats.add_all(times)
