"""The first stage of the pipeline: inputs of any kind to images of the network's size, on threads, in order.

    cpu   inputs --threads: read, decode at a small scale, resize--> images
    gpu   inputs --threads: read--> JPEGs --a thread: decode in groups on the GPU--> --threads: resize--> images

Either way the last step is the one resize of training.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from cloudrt.errors import DataError, ImageError
from cloudrt.images.gpu_decode import GpuJpegDecoder
from cloudrt.images.image import Image, ImageFile, StoredImage, is_plain_jpeg, load_image, read_file, resize
from cloudrt.labels import Grid
from cloudrt.system.overlap import overlap
from cloudrt.system.statistics import StageStats

DECODERS = ("cpu", "gpu")
GROUP = 16
"""JPEGs that the GPU decodes at once."""

Input = str | Path | bytes | ImageFile | StoredImage | Image


@dataclass(frozen=True)
class Decoded:
    """One input: an image of the network's size, or why there is none.

    Parameters
    ----------
    number
        Its position among the inputs.
    key
        Of its rows.
    image
        (H, W, 3) uint8 RGB.
    error
        Why it failed.
    """

    number: int
    key: str
    image: Image | None
    error: str | None


@dataclass(frozen=True)
class _Read:
    """The bytes of a JPEG that the GPU is to decode, or what came of another input."""

    number: int
    key: str
    data: bytes
    done: Decoded | None = None


class Decoding:
    """How inputs become images.

    Parameters
    ----------
    size
        Height and width of the images.
    max_pixels
        Larger inputs are failures.
    stats
        Counts the time of each image.
    decoder
        None decodes on the CPU.
    """

    def __init__(self, size: Grid, max_pixels: int, stats: StageStats, decoder: GpuJpegDecoder | None = None) -> None:
        self.size, self.max_pixels, self.stats, self.decoder = size, max_pixels, stats, decoder

    def run(
        self, inputs: Iterable[Input], threads: ThreadPoolExecutor, ahead: int, gpu: ThreadPoolExecutor | None = None
    ) -> Iterator[Decoded]:
        """Yield an answer for each input, in order, with up to `ahead` under way."""
        if self.decoder is None or gpu is None:
            return overlap(threads, self._decode, enumerate(inputs), ahead, self.stats.pulled)
        read = overlap(threads, self._read, enumerate(inputs), ahead + GROUP)
        groups = overlap(gpu, self._decode_group, _groups(read, GROUP), 2)
        return overlap(threads, self._resize, (one for group in groups for one in group), ahead, self.stats.pulled)

    def _decode(self, numbered: tuple[int, Input]) -> Decoded:
        return self._load(numbered[0], *_key(*numbered))

    def _read(self, numbered: tuple[int, Input]) -> _Read:
        number, (key, source) = numbered[0], _key(*numbered)
        if not isinstance(source, str | Path | bytes | StoredImage):
            return _Read(number, key, b"", self._decode(numbered))
        try:
            if isinstance(source, StoredImage):
                source = source.read()
                if not isinstance(source, bytes):
                    return _Read(number, key, b"", self._load(number, key, source))
            data = source if isinstance(source, bytes) else read_file(source)
            if is_plain_jpeg(data, self.max_pixels):
                return _Read(number, key, data)
            return _Read(number, key, b"", self._load(number, key, data))
        except ImageError as error:
            return _Read(number, key, b"", Decoded(number, key, None, str(error)))

    def _decode_group(self, group: list[_Read]) -> list[tuple[_Read, Image | None, float]]:
        """Return each item, its image where the GPU could decode it, and its share of the seconds."""
        if self.decoder is None:
            raise DataError("no GPU decoder was opened")
        jpegs = [item.data for item in group if item.done is None]
        began = time.perf_counter()
        images = iter(self.decoder.decode(jpegs) if jpegs else [])
        share = (time.perf_counter() - began) / max(1, len(jpegs))
        return [(item, next(images) if item.done is None else None, share) for item in group]

    def _resize(self, decoded: tuple[_Read, Image | None, float]) -> Decoded:
        item, image, seconds = decoded
        if item.done:
            return item.done
        if image is None:  # the CPU's decoder knows more kinds, and says what is wrong
            return self._load(item.number, item.key, item.data)
        began = time.perf_counter()
        resized = resize(image, self.size)
        self.stats.add(seconds + time.perf_counter() - began)
        return Decoded(item.number, item.key, resized, None)

    def _load(self, number: int, key: str, source: str | Path | bytes | StoredImage | Image) -> Decoded:
        with self.stats.timed():
            try:
                if isinstance(source, StoredImage):
                    source = source.read()
                if not isinstance(source, str | Path | bytes | np.ndarray):
                    raise ImageError(f"is no path, bytes or array but {type(source).__name__}")
                return Decoded(number, key, load_image(source, self.size, self.max_pixels), None)
            except ImageError as error:
                return Decoded(number, key, None, str(error))


def open_decoder(decoder: str, threads: int, device: int) -> GpuJpegDecoder | None:
    """Return the GPU's decoder, or None for the CPU's.

    Raises
    ------
    DataError, ProviderError
        No such decoder; it cannot run here.
    """
    if decoder not in DECODERS:
        raise DataError(f"decoder is one of {', '.join(DECODERS)}, found {decoder!r}")
    return GpuJpegDecoder(device, threads) if decoder == "gpu" else None


def _key(number: int, source: Input) -> tuple[str, str | Path | bytes | StoredImage | Image]:
    if isinstance(source, ImageFile):
        return source.key, source.path
    if isinstance(source, StoredImage):
        return source.key, source
    return (str(source) if isinstance(source, str | Path) else f"image-{number}"), source


def _groups(items: Iterator[_Read], size: int) -> Iterator[list[_Read]]:
    while group := list(islice(items, size)):
        yield group
