"""The first stage of the pipeline: threads read inputs, and decode and resize them to the network's input size.

    cpu   inputs --threads: read, decode at a small scale, resize--> images
    gpu   inputs --threads: read--> JPEGs --one thread: decode and resize groups on the GPU--> images

Both use the same resize filter as training. Inputs are processed in order, in groups of one or several batches. Each
thread takes a part of a group and writes the images to their rows of the group's array.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from cloudrt.errors import ImageError
from cloudrt.images.image import Image, ImageFile, StoredImage, is_plain_jpeg, load_image, read_file, to_array
from cloudrt.labels import Grid
from cloudrt.system.cuda import Batch, DeviceArray
from cloudrt.system.overlap import overlap, overlap_parts
from cloudrt.system.statistics import StageStats

CALL_S = 0.05
"""Upper limit of the expected duration of a call on a thread, in seconds; a call has at least one image. Closing a run
waits for the calls that have started."""
FIRST_PART = 16
"""Largest number of images per call as long as the time per image is unknown."""

Input = str | Path | bytes | ImageFile | StoredImage | Image


@dataclass(frozen=True)
class Decoded:
    """A group of consecutive inputs, decoded: one or several batches.

    Parameters
    ----------
    number
        Position of the group's first input among all inputs.
    keys
        Keys of the rows of these inputs, in the table that is written.
    sources
        For each input, the path of its file or (H, W) of its array; None for bytes and images in stores.
    images
        (n, H, W, 3) uint8 RGB; failed inputs are black.
    errors
        Row -> reason, of the inputs that failed.
    """

    number: int
    keys: list[str]
    sources: list[str | Path | Grid | None]
    images: Batch
    errors: dict[int, str]


@dataclass
class _Part:
    """The inputs of a group that one thread decodes, from row `begin` on.

    Parameters
    ----------
    group
        (n, H, W, 3): the images of the whole group.
    begin
        Row of the first input.
    number
        Position of the first input among all inputs.
    inputs
        The inputs.
    keys, sources, errors
        See `Decoded`.
    jpegs
        Row -> bytes of the file, for the inputs that the GPU decodes.
    """

    group: Batch
    begin: int
    number: int
    inputs: list[Input]
    keys: list[str] = field(default_factory=list)
    sources: list[str | Path | Grid | None] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    jpegs: dict[int, bytes] = field(default_factory=dict)

    def note(self, source: Input) -> object:
        """Append the key and the source of the next input; return its path, bytes, stored image or array."""
        if isinstance(source, ImageFile):
            self.keys.append(source.key)
            self.sources.append(source.path)
            return source.path
        key, where = _key(self.number + len(self.keys), source)
        self.keys.append(key)
        if isinstance(where, str | Path):
            self.sources.append(where)
        else:
            self.sources.append(where.shape[:2] if isinstance(where, np.ndarray) and where.ndim == 3 else None)
        return where


class BatchDecoder(Protocol):
    """Decodes JPEGs to batches on a device; see `cloudrt.engines.gpu_images.GpuImages`."""

    place: tuple[str, int]

    def empty(self, count: int) -> DeviceArray:
        """Return an uninitialised array for `count` images, (count, H, W, 3) uint8, on the device."""
        ...

    def decode(self, files: Sequence[bytes], batch: Batch, rows: Sequence[int]) -> list[bool]:
        """Decode each JPEG to its row of a batch; return for each whether it was decoded. Not thread-safe."""
        ...

    def put(self, image: Image, batch: DeviceArray, row: int) -> None:
        """Copy an image from the host to a row of a batch on the device."""
        ...


class Decoding:
    """Reads and decodes inputs.

    Parameters
    ----------
    size
        Height and width of the decoded images.
    max_pixels
        Files with more pixels fail; arrays are not checked.
    stats
        Records the time to read and decode each image; for images that the GPU decodes, without reading.
    decoder
        Decoder on a GPU, or None to decode on the CPU.
    """

    def __init__(self, size: Grid, max_pixels: int, stats: StageStats, decoder: BatchDecoder | None = None) -> None:
        self.size, self.max_pixels, self.stats, self.decoder = size, max_pixels, stats, decoder

    def run(
        self,
        inputs: Iterable[Input],
        threads: ThreadPoolExecutor,
        empty: Callable[[], Batch],
        ahead: int,
        gpu: ThreadPoolExecutor | None = None,
    ) -> Iterator[Decoded]:
        """Yield the inputs in groups, in order.

        Parameters
        ----------
        inputs
            Read lazily.
        threads
            Pool that decodes.
        empty
            Returns an array, (n, H, W, 3), for the next group of up to n images.
        ahead
            Largest number of groups in flight in each step.
        gpu
            Pool of one thread that calls the GPU decoder; None if there is no GPU decoder.
        """
        groups = self._split(inputs, empty)
        if self.decoder is None or gpu is None:
            done = overlap_parts(threads, self._decode, groups, ahead)
        else:
            read = overlap_parts(threads, self._read, groups, ahead)
            decoded = overlap(gpu, self._decode_group, read, 2)
            done = overlap_parts(threads, self._decode_rest, decoded, ahead)
        for parts in done:
            group = _join(parts)
            self.stats.pulled(len(group.keys))
            yield group

    def _split(self, inputs: Iterable[Input], empty: Callable[[], Batch]) -> Iterator[Iterator[_Part]]:
        """Yield the parts of each group; inputs are read lazily."""
        left, number = iter(inputs), 0
        while True:
            group = empty()
            parts = self._parts(left, number, group)
            first = next(parts, None)
            if first is None:
                return
            yield chain((first,), parts)
            number += len(group)

    def _parts(self, left: Iterator[Input], number: int, group: Batch) -> Iterator[_Part]:
        done = self.stats.count
        most = int(CALL_S * done / max(self.stats.seconds, 1e-9)) if done else FIRST_PART
        step = max(1, min(-(-len(group) // self.stats.threads), most))
        for begin in range(0, len(group), step):
            some = list(islice(left, min(step, len(group) - begin)))
            if not some:
                return
            yield _Part(group, begin, number + begin, some)

    def _decode(self, part: _Part) -> _Part:
        times = [time.perf_counter()]
        for row, source in enumerate(part.inputs, part.begin):
            self._load(part, row, part.note(source))
            times.append(time.perf_counter())
        self.stats.add_all([end - begin for begin, end in pairwise(times)])
        return part

    def load(self, source: object, out: Image) -> str | None:
        """Decode one input to `out`, (H, W, 3); on failure, return the reason and set `out` to zero."""
        try:
            if isinstance(source, StoredImage):
                source = source.read()
            if isinstance(source, _Failed):
                raise ImageError(source.reason)
            if not isinstance(source, str | Path | bytes | np.ndarray):
                raise ImageError(f"is of type {type(source).__name__}, expected a path, bytes or an array")
            load_image(source, self.size, self.max_pixels, out)
        except ImageError as error:
            out[...] = 0
            return str(error)
        return None

    def _load(self, part: _Part, row: int, source: object) -> None:
        out = np.empty((*self.size, 3), np.uint8) if isinstance(part.group, DeviceArray) else part.group[row]
        error = self.load(source, out)
        if error is not None:
            part.errors[row] = error
        if self.decoder is not None and isinstance(part.group, DeviceArray):
            self.decoder.put(out, part.group, row)

    def _read(self, part: _Part) -> _Part:
        """Read the JPEGs for the GPU; decode other inputs."""
        for row, source in enumerate(part.inputs, part.begin):
            began = time.perf_counter()
            where = part.note(source)
            try:
                if isinstance(where, StoredImage):
                    where = where.read()
                if isinstance(where, str | Path):
                    where = read_file(where)
                if isinstance(where, bytes) and is_plain_jpeg(where, self.max_pixels):
                    part.jpegs[row] = where
                    continue
            except ImageError as error:
                where = _Failed(str(error))
            self._load(part, row, where)
            self.stats.add(time.perf_counter() - began)
        return part

    def _decode_group(self, parts: list[_Part]) -> list[_Part]:
        """Decode the JPEGs of a group on the GPU; those that it cannot decode are left in `jpegs`."""
        jpegs = [(part, row, data) for part in parts for row, data in part.jpegs.items()]
        if self.decoder is None or not jpegs:
            return parts
        began = time.perf_counter()
        done = self.decoder.decode([data for _, _, data in jpegs], parts[0].group, [row for _, row, _ in jpegs])
        for (part, row, _), sound in zip(jpegs, done, strict=True):
            if sound:
                del part.jpegs[row]
        self.stats.add((time.perf_counter() - began) / len(jpegs), sum(done))
        return parts

    def _decode_rest(self, part: _Part) -> _Part:
        """Decode the JPEGs that the GPU could not: libjpeg-turbo decodes more kinds of JPEG, and reports errors."""
        for row, data in part.jpegs.items():
            began = time.perf_counter()
            self._load(part, row, data)
            self.stats.add(time.perf_counter() - began)
        return part


@dataclass(frozen=True)
class _Failed:
    """An input that could not be read."""

    reason: str


def _key(number: int, source: Input) -> tuple[str, object]:
    """Return the key of an input, and its path, bytes, stored image or array."""
    if isinstance(source, StoredImage):
        return source.key, source
    if isinstance(source, str | Path):
        return str(source), source
    try:
        return f"image-{number}", to_array(source)
    except ImageError as error:
        return f"image-{number}", _Failed(str(error))


def _join(parts: list[_Part]) -> Decoded:
    keys = [key for part in parts for key in part.keys]
    sources = [source for part in parts for source in part.sources]
    errors = {row: error for part in parts for row, error in part.errors.items()}
    return Decoded(parts[0].number, keys, sources, parts[0].group[: len(keys)], errors)
