"""The engine stage of the pipeline: an engine runs the batches of each group of decoded inputs.

`infer_group` runs on the engine threads of `Segmenter`; a thread runs the batches of one group on one engine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

from cloudrt.engines.pool import EnginePool
from cloudrt.errors import MemoryExhausted
from cloudrt.images.decoding import Decoded
from cloudrt.masks.postprocess import Maps
from cloudrt.model.inferred import Inferred
from cloudrt.system.statistics import StageStats


@dataclass(frozen=True)
class Batches:
    """Consecutive batches of one size, and the network's outputs for them.

    Parameters
    ----------
    rows
        Their rows in the group; batch k has `rows[k * size : (k + 1) * size]`.
    size
        Batch size of the engine; the last batch of a group may have fewer rows.
    outputs
        For each batch, a pair, or None if every input of the batch failed: levels, (n, C, W, H) uint8, and presence,
        (n, C) uint8 or None if the artifact has no presence output.
    """

    rows: range
    size: int
    outputs: list[Maps | None]

    def numbers(self, rows: range) -> range:
        """Return the numbers of the batches that these rows belong to."""
        begin = self.rows.start
        return range((rows.start - begin) // self.size, -(-(rows.stop - begin) // self.size))

    def rows_of(self, number: int, count: int = 1) -> range:
        """Return the rows of `count` batches from `number` on."""
        return self.rows[number * self.size : (number + count) * self.size]


@dataclass(frozen=True)
class Group:
    """Consecutive inputs, decoded, and the network's outputs for them, in order."""

    decoded: Decoded
    batches: list[Batches] = field(default_factory=list)

    def each(self) -> Iterator[Inferred]:
        """Yield the outputs for each input."""
        decoded = self.decoded
        for batches in self.batches:
            for position, row in enumerate(batches.rows):
                number, place = divmod(position, batches.size)
                error, output = decoded.errors.get(row), batches.outputs[number]
                levels, presence = (None, None) if error is not None or output is None else output
                yield Inferred(
                    image=decoded.keys[row],
                    probability=None if levels is None else levels[place],
                    presence=None if presence is None else presence[place],
                    error=error,
                    batch=decoded.number + row - place,
                    batch_size=batches.size,
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
    decoded, times, outputs = group.decoded, list[float](), list[Maps | None]()
    errors, images, count = decoded.errors, decoded.images, len(decoded.keys)
    batches = [range(row, min(row + size, count)) for row in range(begin, count, size)]
    failed = [rows for rows in batches if all(row in errors for row in rows)] if errors else ()
    sound = [rows for rows in batches if rows not in failed] if failed else batches
    try:
        with closing(pool.run_each([images[rows.start : rows.stop] for rows in sound], size)) as found:
            for rows in batches:
                if failed and rows in failed:
                    outputs.append(None)
                    continue
                began = time.perf_counter()
                outputs.append(next(found))
                times.append(time.perf_counter() - began)
    finally:
        stats.add_all(times)
        if outputs:
            group.batches.append(Batches(range(begin, batches[len(outputs) - 1].stop), size, outputs))
