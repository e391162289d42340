"""The last stage of the pipeline: threads apply the rules to the network's outputs.

    groups -> shares of their rows --threads: rules, a share at a time--> texts -> results

The threads share the rows of each group, and two groups are in progress at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cloudrt.images.decoding import Decoded
from cloudrt.inference.groups import Batches, Group
from cloudrt.inference.results import Result
from cloudrt.labels import Grid, Labels
from cloudrt.masks.postprocess import Maps
from cloudrt.system.overlap import overlap_parts
from cloudrt.system.statistics import StageStats

ApplyRules = Callable[[Sequence[Maps]], list[str]]
"""Returns the RLE texts of batches as one list; see `cloudrt.masks.postprocess.postprocess_batches`."""


_Piece = tuple[Batches, range]
"""Batches, and some of their rows."""
_Share = tuple[Decoded, list[_Piece]]
"""Rows of a group for one thread."""


class Texts(NamedTuple):
    """The RLE texts of some rows of a group, with what their results need.

    Parameters
    ----------
    keys, sources
        See `cloudrt.images.decoding.Decoded`.
    errors
        For each row, why its input failed, or None.
    rle
        The texts of each row in turn, one per class.
    batches
        For each `Batches`: the position of each batch's first input among all inputs, the number of these rows in each
        batch, and the batch size.
    sound
        Number of rows whose input did not fail.
    maps
        A copy of the maps of each row, (C, H, W) uint8 or None; None if no maps are wanted.
    """

    keys: list[str]
    sources: list[str | Path | Grid | None]
    errors: list[str | None]
    rle: list[str]
    batches: list[tuple[range, list[int], int]]
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
        pieces: list[_Piece] = []
        room = size
        for batches in group.batches:
            rows = batches.rows
            while len(rows) >= room:  # the other rows belong to the next share
                pieces.append((batches, rows[:room]))
                yield group.decoded, pieces
                pieces, rows, room = [], rows[room:], size
            if rows:
                pieces.append((batches, rows))
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
        batches = [_places(decoded.number, batches, some) for batches, some in pieces]
        classes = self.labels.classes
        rle = self.texts([maps for piece in pieces for maps in _sound_maps(*piece, failed)])
        if failed:
            sound_texts = iter(rle)
            rle = ["" if row in failed else next(sound_texts) for row in rows for _ in classes]
        assert len(rle) == len(keys) * len(classes) == len(rows) * len(classes)  # `results` would leave out the rest
        maps = [one for piece in pieces for one in _maps(*piece, failed)] if self.probabilities else None
        sound = errors.count(None)
        if sound:
            self.stats.add((time.perf_counter() - began) / sound, sound)
        return Texts(keys, sources, errors, rle, batches, sound, maps)

    def results(self, texts: Texts) -> Iterator[Result]:
        """Yield the result of each row.

        The thread that uses the results makes them, one at a time: results that another thread has made would have to
        be fetched from the caches of its core.
        """
        batches, classes = texts.batches, self.labels.classes
        each = iter(texts.rle)
        of_rows = zip(*[each] * len(classes), strict=True)  # as many texts at a time as there are classes
        return map(  # the loop over the rows runs in C
            Result,
            texts.keys,
            map(dict, map(zip, repeat(classes), of_rows)),
            texts.errors,
            repeat(self.labels),
            chain.from_iterable(chain.from_iterable(map(repeat, firsts, counts) for firsts, counts, _ in batches)),
            chain.from_iterable(repeat(size, sum(counts)) for _, counts, size in batches),
            repeat(None),
            texts.sources,
            repeat(None) if texts.maps is None else texts.maps,
            repeat(self.max_pixels),
        )


def _places(number: int, batches: Batches, some: range) -> tuple[range, list[int], int]:
    """Return the entry of `Texts.batches` for some rows; `number` is the position of the group's first input."""
    size, numbers = batches.size, batches.numbers(some)
    counts = [size] * len(numbers)
    begin = batches.rows_of(numbers[0]).start
    counts[0] -= some.start - begin
    counts[-1] -= begin + size * len(numbers) - some.stop
    return range(number + begin, number + some.stop, size), counts, size


def _parts(batches: Batches, some: range) -> Iterator[tuple[Maps | None, range, range]]:
    """Yield, for each batch with some of the rows, its output, all of its rows, and those that are among `some`."""
    for number in batches.numbers(some):
        rows = batches.rows_of(number)
        yield batches.outputs[number], rows, range(max(rows.start, some.start), min(rows.stop, some.stop))


def _sound_maps(batches: Batches, some: range, errors: dict[int, str]) -> Iterator[Maps]:
    """Yield the levels and presence of some rows of each batch, without the rows of failed inputs."""
    numbers = batches.numbers(some)
    if not errors and some == batches.rows_of(numbers.start, len(numbers)):
        yield from filter(None, batches.outputs[numbers.start : numbers.stop])
        return
    for output, rows, wanted in _parts(batches, some):
        sound = [row for row in wanted if row not in errors] if errors else wanted
        if output is None or not sound:
            continue
        levels, presence = output
        if len(sound) < len(rows):
            begin, end = sound[0] - rows.start, sound[-1] - rows.start + 1
            whole = end - begin == len(sound)  # a slice is a view; a list of rows copies
            taken = slice(begin, end) if whole else [row - rows.start for row in sound]
            levels, presence = levels[taken], None if presence is None else presence[taken]
        yield levels, presence


def _maps(batches: Batches, some: range, errors: dict[int, str]) -> Iterator[NDArray[np.uint8] | None]:
    """Yield a copy of the maps of each row, (C, H, W); None for failed inputs."""
    for output, rows, wanted in _parts(batches, some):
        for row in wanted:
            if output is None or row in errors:
                yield None
            else:
                yield output[0][row - rows.start].transpose(0, 2, 1).copy()
