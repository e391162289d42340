"""The last stage of the pipeline: threads apply the rules to the network's outputs, and make results.

    groups -> shares of their images --threads: rules, a batch at a time--> results

The threads share the images of each group, and two groups are in progress at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from cloudrt.images.decoding import Decoded
from cloudrt.inference.groups import BatchOutput, Group
from cloudrt.inference.results import Result
from cloudrt.labels import Labels
from cloudrt.system.overlap import overlap_parts
from cloudrt.system.statistics import StageStats

Texts = Callable[[NDArray[np.uint8], NDArray[np.uint8] | None], list[list[str]]]
"""Returns the RLE texts, one per class, of images with (n, C, W, H) levels and (n, C) presence or None."""


_Share = tuple[Decoded, list[tuple[BatchOutput, range]]]
"""Rows of a group for one thread, as pairs of a batch and its rows."""


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

    def _shares(self, group: Group) -> Iterator[_Share]:
        """Divide the rows of a group among the threads."""
        size = -(-len(group.decoded.keys) // self.stats.threads)
        pieces: list[tuple[BatchOutput, range]] = []
        room = size
        for batch in group.batches:
            begin, end = batch.rows.start, batch.rows.stop
            while begin < end:
                rows = range(begin, min(begin + room, end))
                pieces.append((batch, rows))
                begin, room = rows.stop, room - len(rows)
                if not room:
                    yield group.decoded, pieces
                    pieces, room = [], size
        if pieces:
            yield group.decoded, pieces

    def _finish(self, share: _Share) -> list[Result]:
        """Return the results of some rows of a group."""
        decoded, pieces = share
        errors, labels, classes, most = decoded.errors, self.labels, self.labels.classes, self.max_pixels
        began = time.perf_counter()
        texts, batches = list[list[str]](), list[tuple[int, int]]()
        for batch, rows in pieces:
            texts += self._texts_of(batch, rows, errors)
            batches += [(decoded.number + batch.rows.start, batch.size)] * len(rows)
        rows = range(pieces[0][1].start, pieces[-1][1].stop)
        keys, sources = decoded.keys[rows.start : rows.stop], decoded.sources[rows.start : rows.stop]
        rles = [dict(zip(classes, some)) for some in texts]  # noqa: B905 - `strict` takes as long as the rest
        results = [
            Result(key, rle, errors.get(row), labels, first, size, None, source, None, most)
            for row, key, source, rle, (first, size) in zip(rows, keys, sources, rles, batches, strict=True)
        ]
        if self.probabilities:
            _set_probabilities(results, pieces)
        sound = sum(row not in errors for row in rows) if errors else len(rows)
        if sound:
            self.stats.add((time.perf_counter() - began) / sound, sound)
        return results

    def _texts_of(self, batch: BatchOutput, rows: range, errors: dict[int, str]) -> list[list[str]]:
        """Return the RLE texts of some rows of a batch; those of failed inputs are empty."""
        probability, presence, first = batch.probability, batch.presence, batch.rows.start
        sound = [row for row in rows if row not in errors] if errors else rows
        if not sound or probability is None:
            return [[""] * len(self.labels.classes)] * len(rows)
        if len(sound) < len(batch.rows):
            whole = sound[-1] - sound[0] + 1 == len(sound)  # a slice is a view; a list of rows copies
            some = slice(sound[0] - first, sound[-1] - first + 1) if whole else [row - first for row in sound]
            probability, presence = probability[some], None if presence is None else presence[some]
        texts = self.texts(probability, presence)
        if len(sound) == len(rows):
            return texts
        found = iter(texts)
        return [[""] * len(self.labels.classes) if row in errors else next(found) for row in rows]


def _set_probabilities(results: list[Result], pieces: list[tuple[BatchOutput, range]]) -> None:
    """Set `probability` of each result without an error to a copy of its map."""
    left = iter(results)
    for batch, rows in pieces:
        for row, result in zip(rows, left, strict=False):
            if result.error is None and batch.probability is not None:
                result.probability = batch.probability[row - batch.rows.start].transpose(0, 2, 1).copy()
