"""Stored probabilities of a data set, for tuning without running the network again.

The file is an `.npz`, readable by numpy: `labels` is the JSON of classes and grids; for each image, `maps/KEY` is the
(C, W, H) uint8 of the artifact's `probability` output and, if the artifact has one, `presence/KEY` its (C,) uint8
`presence` output. Images are written and read one at a time, so that memory holds one.
"""

from __future__ import annotations

import json
import lzma
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cloudrt.data.folder import DataFolder
from cloudrt.errors import DataError
from cloudrt.images.image import ImageFile
from cloudrt.labels import Labels
from cloudrt.model.inferred import Inferred
from cloudrt.search.tables import LabelledMaps
from cloudrt.system.files import is_special, replacing

_DAMAGE = (
    KeyError,
    EOFError,
    OSError,
    ValueError,
    MemoryError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    tokenize.TokenError,
    SyntaxError,
)
"""Exceptions that zipfile and NumPy raise for damaged, encrypted or manipulated files."""

MAX_LABELS_BYTES = 2**20
"""Largest size of `labels` in bytes after decompression; compressed, it can be a thousand times smaller."""
MAX_MAP_BYTES = 2**30
"""Largest size of the maps of one image, in bytes."""
MAX_MEMBERS = 10_000_000
"""Largest number of arrays in a file."""
_HEADER_BYTES = 4096
"""Largest size of the header of an array, in bytes; NumPy writes 128."""

_LABELS, _MAPS, _PRESENCE = "labels.npy", "maps/", "presence/"


class ProbabilityWriter:
    """Writes one image after another; see `write_probabilities`."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    def add(self, key: str, levels: NDArray[np.uint8], presence: NDArray[np.uint8] | None = None) -> None:
        """Write the (C, W, H) uint8 levels of an image and, if given, its (C,) uint8 presence levels."""
        self._write(f"{_MAPS}{key}.npy", levels)
        if presence is not None:
            self._write(f"{_PRESENCE}{key}.npy", presence)

    def keep(self, inferred: Inferred) -> None:
        """Write the network's output for an image, unless the image failed."""
        if inferred.probability is not None:
            self.add(inferred.image, inferred.probability, inferred.presence)

    def _write(self, name: str, array: NDArray[np.generic]) -> None:
        with self._archive.open(name, "w") as file:
            np.lib.format.write_array(file, array, allow_pickle=False)


@contextmanager
def write_probabilities(path: str | Path, labels: Labels) -> Iterator[ProbabilityWriter]:
    """Open a file of probabilities for writing; it is created atomically at the end of the block."""
    with (
        replacing(path) as partial,
        # Level 1 compresses maps about five times, and takes a few milliseconds per image.
        zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        writer = ProbabilityWriter(archive)
        writer._write(_LABELS, np.array(json.dumps(labels.to_dict())))
        yield writer


class Probabilities:
    """A file of probabilities, open for reading; a context manager.

    Parameters
    ----------
    path
        Written by `write_probabilities`.

    Raises
    ------
    DataError
        A missing file, or a file that does not contain probabilities.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            if is_special(path):
                raise DataError("not a regular file")
            self._archive = zipfile.ZipFile(self.path)
        except FileNotFoundError:
            raise DataError(f"{path} is missing") from None
        except _DAMAGE as error:
            raise DataError(f"{path} is not a file of probabilities: {error}") from error
        self._names = set(self._archive.namelist())
        try:
            if len(self._names) > MAX_MEMBERS:
                raise DataError(f"{path} contains more than {MAX_MEMBERS:,} arrays")
            if _LABELS not in self._names:
                raise DataError(
                    f"{path} is not a file of probabilities: write one with cloudrt tune --save-probabilities"
                )
            self.labels = self._read_labels()
            self.keys = [
                name.removeprefix(_MAPS).removesuffix(".npy")
                for name in self._archive.namelist()
                if name.startswith(_MAPS)
            ]
            self._check_directory()
        except BaseException:
            self._archive.close()
            raise

    def _read_labels(self) -> Labels:
        array = self._read(_LABELS, MAX_LABELS_BYTES)
        try:
            return Labels.from_dict(json.loads(str(array.item())))
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{self.path}: {error}") from error

    def _check_directory(self) -> None:
        """Raise DataError unless the directory, which has no checksum, lists every array once, by a known name."""
        names = self._archive.namelist()
        known = {_LABELS, *(f"{kind}{key}.npy" for key in self.keys for kind in (_MAPS, _PRESENCE))}
        if not self._names <= known or not len(names) == len(self._names) == _count_members(self.path):
            raise DataError(f"{self.path} is damaged: its directory does not list every array once")

    def read(self, key: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Return the (C, W, H) uint8 levels of an image, and its (C,) uint8 presence levels or None.

        Raises
        ------
        DataError
            The file is damaged, or has no such image.
        """
        height, width = self.labels.submit_grid
        classes = len(self.labels.classes)
        levels = self._read(f"{_MAPS}{key}.npy", min(classes * height * width, MAX_MAP_BYTES))
        name = f"{_PRESENCE}{key}.npy"
        presence = self._read(name, classes) if name in self._names else None
        for array, shape in ((levels, (classes, width, height)), (presence, (classes,))):
            if array is not None and (array.shape != shape or array.dtype != np.uint8):
                raise DataError(f"{self.path}, {key}: expected {shape} uint8, found {array.shape} {array.dtype}")
        return levels, presence

    def has_presence(self, key: str) -> bool:
        """Return whether the file has the presence levels of an image."""
        return f"{_PRESENCE}{key}.npy" in self._names

    def infer(self, files: Sequence[ImageFile]) -> Iterator[Inferred]:
        """Yield the stored output for each image, in order; an image that is not stored fails."""
        known = set(self.keys)
        for file in files:
            if file.key not in known:
                yield Inferred(file.key, None, None, f"is not in {self.path}")
            else:
                yield Inferred(file.key, *self.read(file.key), None)

    def _read(self, name: str, limit: int) -> NDArray[np.uint8]:
        """Return an array of at most `limit` bytes; zipfile reads no more than the size that is checked here."""
        try:
            size = self._archive.getinfo(name).file_size
            if size > limit + _HEADER_BYTES:
                raise DataError(f"{self.path}, {name}: {size:,} bytes, expected at most {limit + _HEADER_BYTES:,}")
            with self._archive.open(name) as file:
                array: NDArray[np.uint8] = np.lib.format.read_array(file, allow_pickle=False)
                file.read()  # zipfile verifies the checksum at the end
        except DataError:
            raise
        except _DAMAGE as error:
            raise DataError(f"{self.path}, {name}: {error}") from error
        return array

    def close(self) -> None:
        """Close the file."""
        self._archive.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _count_members(path: Path) -> int:
    """Return the number of members that the end of a zip file without a comment states (APPNOTE.TXT, 4.3.14-16)."""
    with path.open("rb") as file:
        file.seek(-98, os.SEEK_END)  # an end record takes 22 bytes; with zip64, 56 and 20 more before it
        end = file.read()
    zip64 = end[-42:-38] == b"PK\x06\x07"
    return int.from_bytes(end[-66:-58] if zip64 else end[-12:-10], "little")


def labelled_maps(kept: Probabilities, data: DataFolder) -> Iterator[LabelledMaps]:
    """Yield the stored outputs of each image with its true masks, for `cloudrt.search.tables.measure`.

    Raises
    ------
    DataError
        An image has no rows in train.csv; a damaged array, or a wrong RLE text.
    """
    rows = data.read_train()
    for key in kept.keys:
        if key not in rows:
            raise DataError(f"{data.train_csv}: no rows of {key}, whose probabilities are stored")
        levels, presence = kept.read(key)
        yield LabelledMaps(levels, data.truth_bits(key, rows[key]), presence)
