"""Conversion of a probability map to RLE text: threshold, 8-connected components, area filter, runs.

    pixels --compare, 64 at a time--> bits --changes--> runs --union-find--> components --area--> kept runs --> text

The network's output is uint8 levels 0..255 in the transposed layout (W, H): memory order is RLE order, and a run is a
contiguous range of memory. `apply_rules`, `postprocess_batch` and `postprocess_batches` apply one `Rule` per class.

The lower bound of the run time is the time to read the map from memory once. On one core of an AMD EPYC, for uint8 in
RLE order (bench/results/cpu-full-originals.json), a map of 500 runs takes 4 times as long as that bound; half of the
kernels' time is finding the runs, the only pass over the pixels. A map of 2,300 runs takes 14 times as long: about a
third is finding runs, nearly half is joining them (unpredictable branches), and a seventh is writing digits. For
float32 in C order, which has 4 times as many bytes, the factors are 2 and 5.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloudrt.arguments import check_array, check_number, check_type, shown
from cloudrt.errors import DataError
from cloudrt.masks.rule import Rule

_DTYPES = (np.dtype(np.uint8), np.dtype(np.float32))

Maps = tuple[NDArray[np.uint8], NDArray[np.uint8] | None]
"""Levels, (..., W, H), and presence, (...), or None if the artifact has no presence output; ... is (C,) or (N, C)."""


def postprocess(probability: NDArray[Any], threshold: float, min_area: float) -> str:
    """Return the RLE text of the components of `probability > threshold` that are larger than `min_area` pixels.

    Parameters
    ----------
    probability
        (H, W) float32 in 0..1, or uint8 with a threshold of 0..255. C- and Fortran-ordered arrays are read without a
        copy if they are writable; Fortran order, such as the transpose of the artifact's (W, H) output, is the fastest.
    threshold
        A pixel is on if its probability is greater; NaN is never on. A float32 map is compared in float32.
    min_area
        An 8-connected component is kept if its area in pixels is greater.

    Returns
    -------
    str
        "" if no component is kept.

    Raises
    ------
    DataError
        A wrong shape or dtype, or more than `MAX_PIXELS` pixels; a threshold or an area that is not a number.
    """
    check_array("a probability map", probability, "(H, W)")
    if probability.ndim != 2:
        raise DataError(f"a probability map must be (H, W), found an array of shape {probability.shape}")
    if probability.dtype not in _DTYPES:
        raise DataError(f"a probability map must be float32 in 0..1 or uint8 in 0..255, found {probability.dtype}")
    least = _least(check_number("the threshold", threshold), probability.dtype == _DTYPES[0])
    area = _whole(min_area)
    return "" if least is None else _encode(probability, least, area)


def encode_mask(mask: NDArray[np.uint8]) -> str:
    """Return the RLE text of an (H, W) uint8 mask; a pixel is on if it is not zero."""
    return _encode(mask, np.uint8(1), 0)


@lru_cache(maxsize=1024)
def _least(threshold: float, levels: bool) -> np.uint8 | np.float32 | None:
    """Return the smallest value of the map's dtype that is greater than `threshold`; None if there is none.

    For a float32 map, `threshold` is first rounded to float32.
    """
    if levels:
        return np.uint8(math.floor(max(threshold, -1)) + 1) if threshold < 255 else None
    with np.errstate(over="ignore"):  # a threshold beyond float32 becomes infinite, as in numpy's comparison
        single = np.float32(threshold)
    return None if single == np.inf else np.nextafter(single, np.float32(np.inf))


def _whole(min_area: float) -> int:
    """Return the equivalent integer: an area is greater than 2.5 if and only if it is greater than 2."""
    return int(min(max(check_number("the min area", min_area), 0), MAX_PIXELS))


@cache
def _kernels() -> Any:
    """Return the kernels; imported on first use, because importing numba takes about a second."""
    from cloudrt.kernels import runs

    return runs


def _encode(array: NDArray[Any], least: np.uint8 | np.float32, min_area: int) -> str:
    if not array.size:
        return ""
    by_columns = array.flags.f_contiguous
    lines = np.ascontiguousarray(array.T if by_columns else array)
    if not lines.flags.writeable:  # the kernels only read it, but are compiled for writable arrays
        lines = lines.copy()
    buffers = _buffers(*array.shape)
    if by_columns:
        length = _kernels().columns_to_text(lines, least, min_area, least, 0, buffers.work, buffers.text)
    else:
        words = buffers.row_words, buffers.words
        length = _kernels().rows_to_text(lines, least, min_area, *words, buffers.work, buffers.text)
    return str(buffers.characters[:length], "ascii")


_PIXELS_PER_COPY = 2**23
"""Pixels of a batch that are copied at once, if the kernels cannot read the batch itself."""
_TEXTS_BYTES = 2**22
"""Space for texts, in addition to that for the longest one: a kernel call writes the texts of several hundred maps."""

MAX_PIXELS = 2**31 - 1
"""Largest number of pixels of a map: the kernels count in 32 bits."""


class _Buffers:
    """Work space and output of the kernels for maps of one size; one per thread, reused for the next map."""

    def __init__(self, height: int, width: int) -> None:
        if height * width > MAX_PIXELS:
            raise DataError(f"a map must have at most {MAX_PIXELS} pixels, found {width}x{height}")
        self.shape = height, width
        self.row_words = np.empty((height, -(-width // 64)), np.uint64)
        self.words = np.empty((width, -(-height // 64)), np.uint64)
        self.work = np.empty(_kernels().work_size(width, height), np.int32)
        # Bytes of the longest text, plus 8; see `maps_to_texts`.
        self.most = 2 * _kernels().most_runs(width, height) * (len(str(height * width)) + 1) + 8
        self.text = np.empty(self.most + _TEXTS_BYTES, np.uint8)
        self.characters = self.text.data


_local = threading.local()


def _buffers(height: int, width: int) -> _Buffers:
    """Return this thread's buffers for maps of this size, allocated if the previous call had another size."""
    kept: _Buffers | None = getattr(_local, "buffers", None)
    if kept is None or kept.shape != (height, width):
        kept = _local.buffers = _Buffers(height, width)
    return kept


def apply_rules(
    levels: NDArray[np.uint8], rules: Sequence[Rule], presence: NDArray[np.uint8] | None = None
) -> list[str]:
    """Return the RLE text of each class of one image.

    Parameters
    ----------
    levels
        (C, W, H) uint8: one image of the artifact's `probability` output; read without a copy if C-contiguous.
    rules
        One rule per class.
    presence
        (C,) uint8: the artifact's `presence` output, if it has one.

    Raises
    ------
    DataError
        Different numbers of maps, rules and presence levels; other arrays than uint8; over `MAX_PIXELS` pixels per map.
    """
    _check(levels, 3, rules, presence)
    return _map_texts([(levels, presence)], _rule_table(rules))


def postprocess_batch(
    levels: NDArray[np.uint8], rules: Sequence[Rule], presence: NDArray[np.uint8] | None = None, threads: int = 1
) -> list[list[str]]:
    """Return the RLE texts of a batch: for each image, one per class.

    Parameters
    ----------
    levels
        (N, C, W, H) uint8: the artifact's `probability` output; read without a copy if C-contiguous.
    rules
        One rule per class.
    presence
        (N, C) uint8: the artifact's `presence` output, if it has one.
    threads
        Number of threads; the kernels release the GIL.

    Raises
    ------
    DataError
        See `apply_rules`; also `threads` below 1.
    """
    _check(levels, 4, rules, presence)
    check_type("threads", threads, int, "a whole number")
    if threads < 1:
        raise DataError(f"threads must be at least 1, found {threads}")
    table = _rule_table(rules)
    classes = len(rules)
    if not classes:
        return [[] for _ in levels]

    def share(images: range) -> list[list[str]]:
        """Process a range of images."""
        texts: list[list[str]] = []
        pixels = math.prod(levels.shape[1:])
        step = max(1, len(images) if levels.flags.c_contiguous else _PIXELS_PER_COPY // max(1, pixels))
        for begin in range(images.start, images.stop, step):
            part = slice(begin, min(begin + step, images.stop))
            found = _map_texts([(levels[part], None if presence is None else presence[part])], table)
            texts += [found[i : i + classes] for i in range(0, len(found), classes)]
        return texts

    if threads == 1 or len(levels) < 2:
        return share(range(len(levels)))
    size = -(-len(levels) // threads)
    shares = [range(begin, min(begin + size, len(levels))) for begin in range(0, len(levels), size)]
    with ThreadPoolExecutor(threads) as pool:
        return [texts for one in pool.map(share, shares) for texts in one]


def postprocess_batches(batches: Sequence[Maps], rules: Sequence[Rule]) -> list[str]:
    """Return the RLE texts of several batches as one list: image by image, one per class.

    If all are C-contiguous, a kernel call processes several, without copies. Raises DataError as
    `apply_rules` does, and if the maps of two batches have different sizes.

    Parameters
    ----------
    batches
        Levels, (N, C, W, H) uint8, and presence, (N, C) uint8 or None, of each; all have the same W and H.
    rules
        One rule per class.
    """
    for levels, presence in batches:
        _check(levels, 4, rules, presence)
    if len(sizes := {levels.shape[2:] for levels, _ in batches}) > 1:
        raise DataError(f"batches must have maps of one size, found {sorted(sizes)}")
    if all(levels.flags.c_contiguous for levels, _ in batches):
        return _map_texts(batches, _rule_table(rules))
    return [text for maps, presence in batches for texts in postprocess_batch(maps, rules, presence) for text in texts]


def _check(levels: NDArray[Any], dimensions: int, rules: Sequence[Rule], presence: NDArray[Any] | None) -> None:
    check_array("levels", levels, "uint8")
    if presence is not None:
        check_array("presence", presence, "uint8")
    check_type("rules", rules, (tuple, list), "a list with one Rule per class")
    if not all(isinstance(rule, Rule) for rule in rules):
        raise DataError(f"rules must be a list with one cloudrt.Rule per class, found {shown(rules)}")
    if (
        levels.ndim != dimensions
        or levels.shape[-3] != len(rules)
        or (presence is not None and presence.shape != levels.shape[:-2])
    ):
        found = f"{levels.shape} maps, {len(rules)} rules, presence {None if presence is None else presence.shape}"
        raise DataError(f"each class needs one (W, H) map, one rule and one presence level per image, found {found}")
    for array in (levels, presence):
        if array is not None and array.dtype != np.uint8:
            raise DataError(f"levels and presence must be uint8, found {array.dtype}")


def _rule_table(rules: Sequence[Rule]) -> NDArray[np.int64]:
    columns = [(rule.threshold, rule.min_area, rule.gate_threshold, rule.gate_pixels, rule.presence) for rule in rules]
    return np.array(columns, np.int64).reshape(len(rules), 5)


def _map_texts(parts: Sequence[Maps], table: NDArray[np.int64]) -> list[str]:
    """Return the RLE texts of all maps of several parts, (C, W, H) or (n, C, W, H) levels, of one size."""
    count = sum(counts := [math.prod(levels.shape[:-2]) for levels, _ in parts])
    if not any(levels.size for levels, _ in parts):
        return [""] * count
    arrays = [np.ascontiguousarray(levels) for levels, _ in parts]
    width, height = arrays[0].shape[-2:]
    none = np.uint8(255)
    presence_levels = np.concatenate(
        [np.full(n, none) if p is None else np.asarray(p).reshape(n) for n, (_, p) in zip(counts, parts, strict=True)]
    )
    begins = np.cumsum([0, *counts[:-1]])
    starts = np.array([array.__array_interface__["data"][0] for array in arrays]) - begins * (width * height)
    addresses = np.repeat(starts, counts) + np.arange(count) * (width * height)
    buffers = _buffers(height, width)
    ends, texts = np.empty(count, np.int64), list[str]()
    while (first := len(texts)) < count:
        given = (addresses, width, height), table, presence_levels, first, buffers.most
        last = _kernels().maps_to_texts(*given, ends, buffers.work, buffers.text)
        whole = str(buffers.characters[: ends[last - 1]], "ascii")
        texts += [whole[begin:end] for begin, end in pairwise([0, *ends[first:last].tolist()])]
    return texts
