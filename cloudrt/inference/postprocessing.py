"""The last stage of the pipeline: threads apply the rules to the network's outputs, and make results.

    groups -> shares of their images --threads: rules, a batch at a time--> results

The threads share the images of each group, and two groups are in progress at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from cloudrt.inference.groups import BatchOutput, Group
from cloudrt.inference.results import Result
from cloudrt.labels import Labels
from cloudrt.system.overlap import overlap_parts
from cloudrt.system.statistics import StageStats

Texts = Callable[[NDArray[np.uint8], NDArray[np.uint8] | None], list[list[str]]]
"""Returns the RLE texts, one per class, of images with (n, C, W, H) levels and (n, C) presence or None."""


class Postprocessing:
    """Makes results from the network's outputs.

    Parameters
    ----------
    labels
        Classes and grids.
    texts
        Applies the rules.
    stats
        Records the time per image, and has the number of threads.
    probabilities
        Whether to set `probability` of each result.
    max_pixels
        See `Result`.
    """

    def __init__(self, labels: Labels, texts: Texts, stats: StageStats, probabilities: bool, max_pixels: int) -> None:
        self.labels, self.texts, self.stats, self.probabilities = labels, texts, stats, probabilities
        self.max_pixels = max_pixels

    def run(self, groups: Iterable[Group], threads: ThreadPoolExecutor) -> Iterator[list[Result]]:
        """Yield the results of each group, in order; groups are read lazily."""
        for done in overlap_parts(threads, self._finish, map(self._shares, groups), 2):
            results = [result for share in done for result in share]
            self.stats.pulled(sum(result.error is None for result in results))
            yield results

    def _shares(self, group: Group) -> Iterator[tuple[Group, range]]:
        """Divide the rows of a group among the threads."""
        count = len(group.decoded.keys)
        size = -(-count // self.stats.threads)
        return ((group, range(begin, min(begin + size, count))) for begin in range(0, count, size))

    def _finish(self, share: tuple[Group, range]) -> list[Result]:
        """Return the results of some rows of a group."""
        group, wanted = share
        decoded, labels = group.decoded, self.labels
        errors, classes = decoded.errors, labels.classes
        began, sound, results = time.perf_counter(), 0, []
        for batch in group.batches:
            rows = range(max(wanted.start, batch.rows.start), min(wanted.stop, batch.rows.stop))
            left = [row for row in rows if row not in errors] if errors else rows
            texts = iter(self._some_texts(batch, left))
            sound += len(left)
            first = decoded.number + batch.rows.start
            for row in rows:
                error = errors.get(row)
                rle = dict(zip(classes, next(texts) if error is None else [""] * len(classes), strict=True))
                result = Result(
                    image=decoded.keys[row],
                    rle=rle,
                    error=error,
                    labels=labels,
                    batch=first,
                    batch_size=batch.size,
                    source=decoded.sources[row],
                    max_pixels=self.max_pixels,
                )
                if self.probabilities and error is None and batch.probability is not None:
                    result.probability = batch.probability[row - batch.rows.start].transpose(0, 2, 1).copy()
                results.append(result)
        if sound:
            self.stats.add((time.perf_counter() - began) / sound, sound)
        return results

    def _some_texts(self, batch: BatchOutput, rows: Sequence[int]) -> list[list[str]]:
        """Return the RLE texts of some rows of a group; all of them are in `batch`."""
        if not rows or batch.probability is None:
            return []
        first = batch.rows.start
        whole = rows[-1] - rows[0] + 1 == len(rows)  # otherwise a copy leaves out the failed inputs
        some = slice(rows[0] - first, rows[-1] - first + 1) if whole else [row - first for row in rows]
        return self.texts(batch.probability[some], None if batch.presence is None else batch.presence[some])
