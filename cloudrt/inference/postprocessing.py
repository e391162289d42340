"""The last stage of the pipeline: threads apply the rules to the network's outputs.

    groups -> shares of their rows --threads: rules, a batch at a time--> texts -> results

The threads share the rows of each group, and two groups are in progress at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cloudrt.images.decoding import Decoded
from cloudrt.inference.groups import BatchOutput, Group
from cloudrt.inference.results import Result
from cloudrt.labels import Grid, Labels
from cloudrt.system.overlap import overlap_parts
from cloudrt.system.statistics import StageStats

ApplyRules = Callable[[NDArray[np.uint8], NDArray[np.uint8] | None], list[list[str]]]
"""Returns the RLE texts, one per class, of images with (n, C, W, H) levels and (n, C) presence or None."""


_Share = tuple[Decoded, list[tuple[BatchOutput, range]]]
"""Rows of a group for one thread, as pairs of a batch and its rows."""


class Texts(NamedTuple):
    """The RLE texts of some rows of a group, with what their results need.

    Parameters
    ----------
    keys, sources
        See `cloudrt.images.decoding.Decoded`.
    errors
        For each row, why its input failed, or None.
    rle
        For each row, one text per class.
    batches
        For each batch in turn: how many of these rows it has, the position of its first input among all inputs, and the
        batch size.
    sound
        Number of rows whose input did not fail.
    maps
        A copy of the maps of each row, (C, H, W) uint8 or None; None if no maps are wanted.
    """

    keys: list[str]
    sources: list[str | Path | Grid | None]
    errors: list[str | None]
    rle: list[list[str]]
    batches: list[tuple[int, int, int]]
    sound: int
    maps: list[NDArray[np.uint8] | None] | None


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

    def __init__(
        self, labels: Labels, texts: ApplyRules, stats: StageStats, probabilities: bool, max_pixels: int
    ) -> None:
        self.labels, self.texts, self.stats, self.probabilities = labels, texts, stats, probabilities
        self.max_pixels = max_pixels

    def run(self, groups: Iterable[Group], threads: ThreadPoolExecutor) -> Iterator[list[Texts]]:
        """Yield the texts of each group, in order; groups are read lazily. `results` makes results of them."""
        for done in overlap_parts(threads, self._finish, map(self._shares, groups), 2):
            self.stats.pulled(sum(texts.sound for texts in done))
            yield done

    def _shares(self, group: Group) -> Iterator[_Share]:
        """Divide the rows of a group among the threads."""
        size = -(-len(group.decoded.keys) // self.stats.threads)
        pieces: list[tuple[BatchOutput, range]] = []
        room = size
        for batch in group.batches:
            rows = batch.rows
            while len(rows) >= room:  # the rest of the batch belongs to the next share
                pieces.append((batch, rows[:room]))
                yield group.decoded, pieces
                pieces, rows, room = [], rows[room:], size
            if rows:
                pieces.append((batch, rows))
                room -= len(rows)
        if pieces:
            yield group.decoded, pieces

    def _finish(self, share: _Share) -> Texts:
        """Apply the rules to some rows of a group."""
        decoded, pieces = share
        began = time.perf_counter()
        rows = range(pieces[0][1].start, pieces[-1][1].stop)
        keys, sources = decoded.keys[rows.start : rows.stop], decoded.sources[rows.start : rows.stop]
        failed = decoded.errors
        errors = list(map(failed.get, rows))
        rle, batches = list[list[str]](), list[tuple[int, int, int]]()
        for batch, some in pieces:
            rle += self._texts_of(batch, some, failed)
            batches.append((len(some), decoded.number + batch.rows.start, batch.size))
        assert len(rle) == len(keys) == len(rows)  # `results` would leave out the rest
        maps = list(_maps(pieces, failed)) if self.probabilities else None
        sound = errors.count(None)
        if sound:
            self.stats.add((time.perf_counter() - began) / sound, sound)
        return Texts(keys, sources, errors, rle, batches, sound, maps)

    def results(self, texts: Texts) -> Iterator[Result]:
        """Yield the result of each row.

        The thread that uses the results makes them, one at a time: results that another thread has made would have to
        be fetched from the caches of its core.
        """
        batches = texts.batches
        return map(  # the loop over the rows runs in C
            Result,
            texts.keys,
            map(dict, map(zip, repeat(self.labels.classes), texts.rle)),
            texts.errors,
            repeat(self.labels),
            chain.from_iterable([repeat(first, count) for count, first, _ in batches]),
            chain.from_iterable([repeat(size, count) for count, _, size in batches]),
            repeat(None),
            texts.sources,
            repeat(None) if texts.maps is None else texts.maps,
            repeat(self.max_pixels),
        )

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


def _maps(pieces: list[tuple[BatchOutput, range]], errors: dict[int, str]) -> Iterator[NDArray[np.uint8] | None]:
    """Yield a copy of the maps of each row, (C, H, W); None for failed inputs."""
    for batch, rows in pieces:
        for row in rows:
            if batch.probability is None or row in errors:
                yield None
            else:
                yield batch.probability[row - batch.rows.start].transpose(0, 2, 1).copy()
