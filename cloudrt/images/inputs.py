"""List the images of a run, in order, from folders, image files, patterns, lists and sample submissions."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cloudrt.arguments import check_path
from cloudrt.errors import DataError, ImageError
from cloudrt.images.headers import MAX_PIXELS
from cloudrt.images.image import SUFFIXES, ImageFile, find_images, key_of, load_image
from cloudrt.labels import Grid, Labels
from cloudrt.masks.table import read_table
from cloudrt.system.suggest import CHECKPOINTS

LIST_SUFFIX = ".txt"
MAX_LIST_BYTES = 2**28
"""Lists with more bytes are refused: millions of names have fewer, and a device such as /dev/zero never ends."""
_PICTURES = (".png", ".tif", ".jpg")
"""Suffixes that are added to keys to name the files of masks and overlays."""

T = TypeVar("T")


def list_inputs(inputs: Sequence[str | Path], sample: Path | None, labels: Labels) -> list[ImageFile]:
    """Return the images to predict, in the order of their rows in the output.

    Parameters
    ----------
    inputs
        Folders, including subfolders; image files; `glob` patterns, including **; or lists: .txt files in UTF-8 with
        one path per line, relative to the folder of the list. The key of an image is its path relative to the input
        folder or to the fixed part of the pattern, its line in the list, or the name of the image file.
    sample
        A sample_submission.csv; if given, only its images are returned, in its order. Images that are not in the inputs
        are included with the path where they are expected, so that they are reported as failures.
    labels
        Classes of the sample.

    Raises
    ------
    DataError
        A missing input, one without images, a model or a URL; two inputs with the same key; a malformed list or sample.
    """
    if not inputs:
        raise DataError("no inputs: give a folder of images, an image, a pattern or a .txt list")
    files = join((file.key, str(file.path), file) for one in inputs for file in _find(one))
    if sample is None:
        return list(files.values())
    home = next((Path(path) for path in inputs if Path(path).is_dir()), Path(inputs[0]).parent)
    return [files.get(name, ImageFile(name, home / name)) for name in read_sample(sample, labels)]


def join(found: Iterable[tuple[str, str, T]]) -> dict[str, T]:
    """Return a dictionary of key -> image from triples of key, location and image, in order.

    Raises
    ------
    DataError
        A key that occurs twice: two images share it, or one image is given twice.
    """
    files: dict[str, T] = {}
    places: dict[str, str] = {}
    for key, place, file in found:
        if key in files:
            if place == places[key]:
                raise DataError(f"{place} is given twice, and both would share the key {key!r}: give each image once")
            raise DataError(
                f"{places[key]} and {place} would share the key {key!r}: give one folder that contains both"
            )
        files[key], places[key] = file, place
    return files


def read_sample(sample: Path, labels: Labels) -> list[str]:
    """Return the names of the images in a sample_submission.csv, in its order, each once.

    Raises
    ------
    DataError
        A malformed table, or one without rows.
    """
    wanted = list(dict.fromkeys(name for name, _ in read_table(sample, labels)))
    if not wanted:
        raise DataError(f"{sample} has no rows")
    return wanted


def digest_keys(files: Iterable[ImageFile]) -> str:
    """Return the SHA-256 of the keys and file sizes of the images, in order; part of a run's identity."""
    return digest_sizes((file.key, _size(file.path)) for file in files)


def digest_sizes(sizes: Iterable[tuple[str, int]]) -> str:
    """Return the digest of `digest_keys` from pairs of key and size in bytes; the size of a missing file is -1."""
    digest = hashlib.sha256()
    for key, size in sizes:
        digest.update(key.encode() + b"\0%d\0" % size)
    return digest.hexdigest()


def searched_folders(inputs: Iterable[str | Path]) -> list[Path]:
    """Return the folders that `list_inputs` searches with subfolders: inputs, and A for A/*/*.jpg or A/**."""
    folders = []
    for one in inputs:
        path = Path(one)
        home = path if path.exists() else _fixed_part(str(one))
        if path.is_dir() or (home.is_dir() and (home != path.parent or path.name == "**")):
            folders.append(home)
    return folders


def check_keys(files: Iterable[ImageFile]) -> None:
    """Check that the keys, which name the files of masks and overlays, are distinct paths inside a folder.

    Raises
    ------
    DataError
        An absolute key, or one with "..", which lists can contain; two keys that are equal apart from case, which
        would be one file on a case-insensitive file system; or a key whose file would be the folder of another key.
    """
    seen: dict[str, str] = {}
    for file in files:
        path = str(PurePosixPath(file.key))
        other = seen.setdefault(path.casefold(), file.key)
        if other is not file.key:
            raise DataError(
                f"{other!r} and {file.key!r} would share a file in the folder of `masks` or `overlays`, at least where "
                "case is ignored: rename one, or list each once"
            )
        if PurePosixPath(file.key).is_absolute() or ".." in PurePosixPath(file.key).parts:
            raise DataError(
                f"{file.key!r} would be written outside the folder of `masks` or `overlays`: list a path inside"
            )
    folders = {str(parent) for path in seen for parent in PurePosixPath(path).parents}
    for path, key in seen.items():
        if any(path + suffix in folders for suffix in _PICTURES):
            raise DataError(
                f"the file of {key!r} in the folder of `masks` or `overlays` would have the name of the folder of "
                "other images: rename one"
            )


def load_sample(files: Sequence[ImageFile], size: Grid, count: int, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Return up to `count` of the images, evenly spaced, (N, H, W, 3) uint8 RGB, without those that cannot be read."""
    images = []
    for number in np.unique(np.linspace(0, max(0, len(files) - 1), min(len(files), count)).astype(int)):
        with suppress(ImageError):
            images.append(load_image(files[number].path, size, max_pixels))
    return np.stack(images) if images else np.empty((0, *size, 3), np.uint8)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return -1


def _find(one: str | Path) -> Iterable[ImageFile]:
    path = check_path("an input", one)
    if not str(one):  # such as an unset variable of a shell; as a path, it would be the current folder
        raise DataError('an input is an empty text: give a folder, or "." for the current one')
    if path.suffix.lower() == LIST_SUFFIX and path.is_file():
        names = read_names(path)
        return [ImageFile(Path(name).as_posix() if os.sep != "/" else name, path.parent / name) for name in names]
    if "://" in str(one):
        raise DataError(
            f"{one} is in an object store: cloudrt-infer --cluster reads it, by default with Ray on this machine"
        )
    if path.suffix.lower() in (".onnx", *CHECKPOINTS) and not path.is_dir():
        raise DataError(f"{one} is a model, not an image: name it with `model`")
    if not path.exists() and glob.has_magic(str(one)):
        return _match(str(one))
    if not path.exists() and not path.is_symlink():
        raise DataError(f"{one} is missing: give a folder of images, an image, a 'pattern' in quotes or a .txt list")
    return find_images(path)


def _match(pattern: str) -> list[ImageFile]:
    """Return the images that a pattern matches, sorted by key; matching folders are ignored."""
    home = _fixed_part(pattern)
    rest = Path(pattern).relative_to(home).as_posix()
    found = []
    for path in home.glob(rest):
        key = key_of(path, home)
        hidden = any(part.startswith(".") for part in key.split("/"))
        if path.suffix.lower() in SUFFIXES and not hidden and not path.is_dir():
            found.append(ImageFile(key, path))
    if not found:
        raise DataError(f"{pattern!r} matches no images ({', '.join(sorted(SUFFIXES))})")
    return sorted(found, key=lambda file: file.key)


def _fixed_part(pattern: str) -> Path:
    """Return the part of a pattern before the first component with a wildcard."""
    home = Path(pattern)
    while glob.has_magic(str(home)):
        home = home.parent
    return home


def read_names(path: Path) -> list[str]:
    """Return the names in a list: a text file in UTF-8 with one name per line.

    Raises
    ------
    DataError
        More than `MAX_LIST_BYTES`, not UTF-8, or no name.
    """
    with path.open("rb") as file:
        content = file.read(MAX_LIST_BYTES + 1)
    if len(content) > MAX_LIST_BYTES:
        raise DataError(f"{path} is not a list of images: it has more than {MAX_LIST_BYTES:,} bytes")
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a list in UTF-8: {error.reason} at byte {error.start}") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise DataError(f"{path} names no images")
    return names
