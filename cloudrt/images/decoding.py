"""The first stage of the pipeline: reading and decoding inputs to the network's input size, on threads, in order.

    cpu   inputs --threads: read, decode at a small scale, resize--> images
    gpu   inputs --threads: read--> JPEGs --one thread: decode in groups on the GPU--> --threads: resize--> images

Both end in the same resize as in training. Inputs are processed in groups of one or several batches; threads take parts
of a group and write images to their rows of its array.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import DataError, ImageError
from cloudrt.images.gpu_decode import GpuJpegDecoder
from cloudrt.images.image import Image, ImageFile, StoredImage, is_plain_jpeg, load_image, read_file, resize
from cloudrt.labels import Grid
from cloudrt.system.overlap import overlap, overlap_parts
from cloudrt.system.statistics import StageStats

DECODERS = ("cpu", "gpu")
LARGEST_PART = 16
"""Largest number of images per call on a thread: closing a run waits for them."""

Input = str | Path | bytes | ImageFile | StoredImage | Image


@dataclass(frozen=True)
class Decoded:
    """A group of consecutive inputs, decoded: one or several batches.

    Parameters
    ----------
    number
        Position of the first one among the inputs.
    keys
        Keys of their rows.
    images
        (n, H, W, 3) uint8 RGB; failed inputs are black.
    errors
        Row -> reason, of the inputs that failed.
    """

    number: int
    keys: list[str]
    images: NDArray[np.uint8]
    errors: dict[int, str]


@dataclass
class _Part:
    """The inputs that one thread decodes: rows `begin` and up of a group.

    Parameters
    ----------
    group
        (n, H, W, 3): the images of the whole group.
    begin
        Row of the first.
    numbered
        The inputs, each with its position among all inputs.
    keys, errors
        See `Decoded`.
    jpegs, images
        Row -> bytes, of the inputs for the GPU; row -> decoded image, or None if the GPU cannot decode it.
    """

    group: NDArray[np.uint8]
    begin: int
    numbered: list[tuple[int, Input]]
    keys: list[str] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    jpegs: dict[int, bytes] = field(default_factory=dict)
    images: dict[int, Image | None] = field(default_factory=dict)


class Decoding:
    """Reads and decodes inputs.

    Parameters
    ----------
    size
        Height and width of the images.
    max_pixels
        Larger inputs fail.
    stats
        Records the duration of each image.
    decoder
        Decoder on a GPU; None decodes on the CPU.
    """

    def __init__(self, size: Grid, max_pixels: int, stats: StageStats, decoder: GpuJpegDecoder | None = None) -> None:
        self.size, self.max_pixels, self.stats, self.decoder = size, max_pixels, stats, decoder
        self._share = 0.0  # seconds of the GPU per image

    def run(
        self,
        inputs: Iterable[Input],
        threads: ThreadPoolExecutor,
        empty: Callable[[], NDArray[np.uint8]],
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
            Returns the array, (n, H, W, 3), that the next group of up to n images is written to.
        ahead
            Largest number of groups in flight.
        gpu
            Pool of one thread, if a GPU decodes.
        """
        groups = self._split(inputs, empty)
        if self.decoder is None or gpu is None:
            done = overlap_parts(threads, self._decode, groups, ahead)
        else:
            read = overlap_parts(threads, self._read, groups, ahead)
            decoded = overlap(gpu, self._decode_group, read, 2)
            done = overlap_parts(threads, self._resize, decoded, ahead)
        for parts in done:
            group = _join(parts)
            self.stats.pulled(len(group.keys))
            yield group

    def _split(self, inputs: Iterable[Input], empty: Callable[[], NDArray[np.uint8]]) -> Iterator[Iterator[_Part]]:
        """Yield the parts of each group; inputs are taken lazily."""
        numbered = enumerate(inputs)
        while True:
            parts = self._parts(numbered, empty())
            first = next(parts, None)
            if first is None:
                return
            yield chain((first,), parts)

    def _parts(self, numbered: Iterator[tuple[int, Input]], group: NDArray[np.uint8]) -> Iterator[_Part]:
        step = min(-(-len(group) // self.stats.threads), LARGEST_PART)
        for begin in range(0, len(group), step):
            some = list(islice(numbered, min(step, len(group) - begin)))
            if not some:
                return
            yield _Part(group, begin, some)

    def _decode(self, part: _Part) -> _Part:
        times = []
        for row, (number, source) in enumerate(part.numbered, part.begin):
            began = time.perf_counter()
            key, where = _key(number, source)
            part.keys.append(key)
            self._load(part, row, where)
            times.append(time.perf_counter() - began)
        self.stats.add_all(times)
        return part

    def load(self, source: object, out: Image) -> str | None:
        """Decode one input to `out`, (H, W, 3); on failure, return the reason and set `out` to zero."""
        try:
            if isinstance(source, StoredImage):
                source = source.read()
            if not isinstance(source, str | Path | bytes | np.ndarray):
                raise ImageError(f"is not a path, bytes or an array, but {type(source).__name__}")
            load_image(source, self.size, self.max_pixels, out)
        except ImageError as error:
            out[...] = 0
            return str(error)
        return None

    def _load(self, part: _Part, row: int, source: object) -> None:
        error = self.load(source, part.group[row])
        if error is not None:
            part.errors[row] = error

    def _read(self, part: _Part) -> _Part:
        """Read the JPEGs for the GPU; decode other inputs."""
        for row, (number, source) in enumerate(part.numbered, part.begin):
            began = time.perf_counter()
            key, where = _key(number, source)
            part.keys.append(key)
            try:
                if isinstance(where, StoredImage):
                    where = where.read()
                if isinstance(where, str | Path):
                    where = read_file(where)
                if isinstance(where, bytes) and is_plain_jpeg(where, self.max_pixels):
                    part.jpegs[row] = where
                    continue
                self._load(part, row, where)
            except ImageError as error:
                part.group[row] = 0
                part.errors[row] = str(error)
            self.stats.add(time.perf_counter() - began)
        return part

    def _decode_group(self, parts: list[_Part]) -> list[_Part]:
        """Decode the JPEGs of a group on the GPU."""
        if self.decoder is None:
            raise DataError("no GPU decoder was opened")
        jpegs = [data for part in parts for data in part.jpegs.values()]
        if not jpegs:
            return parts
        began = time.perf_counter()
        images = iter(self.decoder.decode(jpegs))
        self._share = (time.perf_counter() - began) / len(jpegs)
        for part in parts:
            part.images = {row: next(images) for row in part.jpegs}
        return parts

    def _resize(self, part: _Part) -> _Part:
        for row, image in part.images.items():
            began = time.perf_counter()
            if image is None:  # libjpeg-turbo decodes more kinds, and reports what is wrong
                self._load(part, row, part.jpegs[row])
            else:
                resize(image, self.size, part.group[row])
            self.stats.add(self._share + time.perf_counter() - began)
        return part


def open_decoder(decoder: str, threads: int, device: int) -> GpuJpegDecoder | None:
    """Return the GPU decoder for "gpu", or None for "cpu".

    Raises
    ------
    DataError
        An unknown name.
    ProviderError
        The decoder cannot run here.
    """
    if decoder not in DECODERS:
        raise DataError(f"decoder is one of {', '.join(DECODERS)}, found {decoder!r}")
    return GpuJpegDecoder(device, threads) if decoder == "gpu" else None


def _key(number: int, source: Input) -> tuple[str, object]:
    """Return the key of an input and the source of its image."""
    if isinstance(source, ImageFile):
        return source.key, source.path
    if isinstance(source, StoredImage):
        return source.key, source
    return (str(source) if isinstance(source, str | Path) else f"image-{number}"), source


def _join(parts: list[_Part]) -> Decoded:
    keys = [key for part in parts for key in part.keys]
    errors = {row: error for part in parts for row, error in part.errors.items()}
    return Decoded(parts[0].numbered[0][0], keys, parts[0].group[: len(keys)], errors)
