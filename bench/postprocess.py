"""Post-processing on one thread, compared with peers and with the floor, the time to read the map once from memory.

    dense      smoothed noise: about 2,300 runs and 60 components per map
    smooth     noise smoothed more: about 500 runs and 4 components, as from a trained network
    network    maps of the measured model on the images of the run, with its rules

Each set is measured in two forms: "uint8, RLE order", the artifact's output, and "float32, C order", PyTorch's output.
A block is as many passes over a set as take a few milliseconds. Blocks of cloudrt and of all peers alternate, and a
ratio is the median of the ratios within a turn, so that slow periods of the machine cancel out. Before timing, every
peer's texts are compared with ours. pycocotools only encodes a finished mask; the floor only computes the maximum of
the map.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.labels import SUBMIT_GRID, Grid
from cloudrt.masks.postprocess import postprocess
from cloudrt.masks.rle import rle_decode, rle_encode

from . import peers
from .agreement import AgreementError
from .notebook import mask_to_rle

TURNS = 5
BLOCK = 0.004
"""Approximate seconds per block, of at least one pass."""

KINDS = {"dense": (8.3, 0.73, 100), "smooth": (42.0, 0.76, 1000)}
"""Name -> sigma of the smoothing in pixels of the 350x525 grid, share of pixels that are off, min area."""


@dataclass(frozen=True)
class Map:
    """A map in both forms, levels (W, H) uint8 and probability (H, W) float32, with its threshold and min area."""

    levels: NDArray[np.uint8]
    threshold: int
    min_area: int
    probability: NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "probability", np.ascontiguousarray(self.levels.T, np.float32) / np.float32(255))

    @property
    def cut(self) -> float:
        """Threshold of `probability`."""
        return (self.threshold + 0.5) / 255


def draw_maps(kind: str, count: int = 8, grid: Grid = SUBMIT_GRID) -> list[Map]:
    """Return synthetic maps of a kind of `KINDS`, with threshold 127."""
    sigma, off, min_area = KINDS[kind]
    maps = []
    for seed in range(count):
        noise = np.random.default_rng(seed).random(grid, np.float32)
        blurred = cv2.GaussianBlur(noise, (0, 0), sigma)
        low, middle, high = blurred.min(), np.quantile(blurred, off), blurred.max()
        scaled = np.interp(blurred, [low, middle, high], [0, 127.5, 255]).round().astype(np.uint8)
        maps.append(Map(np.ascontiguousarray(scaled.T), 127, min_area))
    return maps


@dataclass(frozen=True)
class PeerTime:
    """Time of a peer in seconds per map, and its time relative to ours: median and quartiles over the turns."""

    name: str
    seconds: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class PostprocessTime:
    """Times for one set of maps in one form.

    Parameters
    ----------
    kind, form, maps
        The set, its form and the number of maps.
    runs, components
        Mean number per map.
    seconds
        Our seconds per map.
    peers
        Every peer, and the floor.
    parts
        Our seconds per map by kernel.
    """

    kind: str
    form: str
    maps: int
    runs: float
    components: float
    seconds: float
    peers: list[PeerTime]
    parts: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return vars(self) | {"peers": [vars(peer) for peer in self.peers]}


def measure(
    sets: Mapping[str, Sequence[Map]], advance: Callable[[], object], turns: int = TURNS
) -> list[PostprocessTime]:
    """Measure each set in both forms; `advance` is called 2 * len(sets) times.

    Raises
    ------
    AgreementError
        A peer gave another text than cloudrt.
    """
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        found = []
        for kind, maps in sets.items():
            for form in ("uint8, RLE order", "float32, C order"):
                found.append(_measure(kind, form, maps, turns))
                advance()
        return found
    finally:
        cv2.setNumThreads(threads)


def _measure(kind: str, form: str, maps: Sequence[Map], turns: int) -> PostprocessTime:
    by_columns = form.startswith("uint8")
    lines = [each.levels if by_columns else each.probability for each in maps]
    cuts = [each.threshold if by_columns else each.cut for each in maps]
    arrays = [each.T if by_columns else each for each in lines]
    areas = [each.min_area for each in maps]

    def ours() -> list[str]:
        return [postprocess(*each) for each in zip(arrays, cuts, areas, strict=True)]

    def theirs(peer: peers.Peer) -> Callable[[], list[str]]:
        return lambda: [peer(one, by_columns, cut, area) for one, cut, area in zip(lines, cuts, areas, strict=True)]

    expected = ours()
    ways: dict[str, Callable[[], object]] = {}
    for name, (peer, module) in peers.PEERS.items():
        if peers.installed(module):
            way = ways[name] = theirs(peer)
            if way() != expected:
                raise AgreementError(
                    f"{name} gives another RLE than cloudrt on the {kind} maps: the times cannot be compared"
                )
    if peers.installed("pycocotools"):
        encode = peers.pycocotools_encode()
        masks = [np.asfortranarray((each.levels > each.threshold).astype(np.uint8).T) for each in maps]
        ways["pycocotools encode"] = lambda: [encode(mask) for mask in masks]
    ways["floor"] = lambda: [one.max() for one in lines]
    seconds, compared = compare(ours, ways, len(maps), turns)
    runs, components = np.mean([_count(each) for each in maps], axis=0)
    return PostprocessTime(
        kind, form, len(maps), float(runs), float(components), seconds, compared, _parts(maps, by_columns, turns)
    )


def compare(
    ours: Callable[[], object], ways: dict[str, Callable[[], object]], per_pass: int, turns: int
) -> tuple[float, list[PeerTime]]:
    """Time alternating blocks; return our median seconds per map and the times of the other ways.

    Parameters
    ----------
    ours, ways
        Functions that process `per_pass` maps.
    per_pass
        Maps per call.
    turns
        Number of timed blocks of each way.
    """
    every = {"ours": ours, **ways}
    passes = {}
    for name, way in every.items():
        way()
        began = time.perf_counter()
        way()
        passes[name] = max(1, round(BLOCK / (time.perf_counter() - began)))
    times: dict[str, list[float]] = {name: [] for name in every}
    for _ in range(turns):
        for name, way in every.items():
            way()  # warm caches, as when maps are processed one after another
            began = time.perf_counter()
            for _ in range(passes[name]):
                way()
            times[name].append((time.perf_counter() - began) / passes[name] / per_pass)
    own = np.array(times.pop("ours"))
    compared = []
    for name, each in times.items():
        low, ratio, high = np.percentile(np.array(each) / own, (25, 50, 75))
        compared.append(PeerTime(name, float(np.median(each)), float(ratio), float(low), float(high)))
    return float(np.median(own)), compared


def _count(one: Map) -> tuple[int, int]:
    """Return the number of runs and of components of a map."""
    mask = (one.levels > one.threshold).astype(np.uint8)
    starts = np.diff(mask, axis=1, prepend=0) == 1
    return int(starts.sum()), cv2.connectedComponents(mask)[0] - 1


def _parts(maps: Sequence[Map], by_columns: bool, turns: int) -> dict[str, float]:
    """Return our seconds per map and kernel: runs (the only pass over the pixels), components, filter, text."""
    from cloudrt.kernels import bits, digits, runs, union_find

    width, height = maps[0].levels.shape
    most = width * ((height + 1) // 2)
    edges, text = np.empty(2 * most, np.int32), np.empty(14 * most + 8, np.uint8)
    first, parent, area = (np.empty(size, np.int32) for size in (width + 1, most, most))
    row_words = np.empty((height, -(-width // 64)), np.uint64)
    words = np.empty((width, -(-height // 64)), np.uint64)
    seconds: dict[str, list[float]] = {"runs": [], "components": [], "filter": [], "text": []}
    for _ in range(2 * turns):
        spent = dict.fromkeys(seconds, 0.0)
        for one in maps:
            marks = [time.perf_counter()]
            if by_columns:
                count = runs.find_runs_in_levels(one.levels, np.uint8(one.threshold + 1), np.uint8(0), 0, edges, first)
            else:
                bits.pack(one.probability, np.float32(one.cut), row_words)
                bits.transpose(row_words, height, width, words)
                count = runs.find_runs_in_words(words, height, edges, first)
            marks.append(time.perf_counter())
            union_find.join_runs(edges, first, width, height, parent, area)
            marks.append(time.perf_counter())
            count = union_find.keep_runs(edges, count, parent, area, one.min_area)
            marks.append(time.perf_counter())
            digits.write_runs(edges, count, text)
            marks.append(time.perf_counter())
            for name, (begin, end) in zip(spent, pairwise(marks), strict=True):
                spent[name] += (end - begin) / len(maps)
        for name, duration in spent.items():
            seconds[name].append(duration)
    return {name: float(np.median(each)) for name, each in seconds.items()}


def measure_rle(maps: Sequence[Map], turns: int = TURNS) -> dict[str, Any]:
    """Return our seconds per mask of `rle_encode` and `rle_decode`, and the times of the peers.

    Raises
    ------
    AgreementError
        A peer gave another result than cloudrt.
    """
    masks = [np.asfortranarray((one.levels > one.threshold).astype(np.uint8).T) for one in maps]
    shape = masks[0].shape
    texts = [rle_encode(mask) for mask in masks]
    encoders: dict[str, Callable[[], object]] = {"numpy": lambda: [mask_to_rle(mask) for mask in masks]}
    decoders: dict[str, Callable[[], object]] = {"numpy": lambda: [peers.rle_decode(text, shape) for text in texts]}
    if encoders["numpy"]() != texts:
        raise AgreementError("NumPy's RLE differs from rle_encode: the times cannot be compared")
    if not all(np.array_equal(peers.rle_decode(text, shape), rle_decode(text, shape)) for text in texts):
        raise AgreementError("NumPy's decoder differs from rle_decode: the times cannot be compared")
    if peers.installed("pycocotools"):
        encode = peers.pycocotools_encode()
        encoders["pycocotools"] = lambda: [encode(mask) for mask in masks]
    done = {}
    for name, ours, ways in (
        ("encode", lambda: [rle_encode(mask) for mask in masks], encoders),
        ("decode", lambda: [rle_decode(text, shape) for text in texts], decoders),
    ):
        seconds, compared = compare(ours, ways, len(masks), turns)
        done[name] = {"seconds": seconds, "peers": [vars(each) for each in compared]}
    return done
