"""Listing and decoding of images: one code path for training, tuning and inference.

A JPEG is decoded at the smallest DCT scale of libjpeg-turbo that covers the requested size, then resized once. Other
files and arrays are first reduced by the same scale, so that all forms of an image give nearly the same result. Damaged
files raise `ImageError` instead of decoding to grey areas. PNG, WebP, TIFF and BMP are decoded by OpenCV, after their
headers are validated. A TIFF is decoded by Pillow first, which reports damaged strips and unknown compressions; OpenCV
fills such strips without an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from cloudrt.errors import DataError, ImageError
from cloudrt.images.headers import MAX_PIXELS, drop_ancillary_chunks, has_end, has_exif, stated_size
from cloudrt.images.resize import reduce, resize
from cloudrt.images.tiff import check_tiff
from cloudrt.labels import Grid
from cloudrt.system.files import is_special

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"})
NO_DATA_LEVEL = 8
"""A pixel has no data if no channel is above this level: the gaps between swaths are black except for JPEG ringing."""

MAX_FILE_BYTES = 2**30
"""Files with more bytes are reported as failures and not read."""
MAX_SCANS = 100
"""JPEGs with more scans are reported as failures, because decoding each scan takes as long as decoding the whole image.
Encoders write about ten scans at most."""

Image = NDArray[np.uint8]
"""(H, W, 3) uint8, RGB."""


@dataclass(frozen=True)
class ImageFile:
    """An image file.

    Parameters
    ----------
    key
        Key of the image's rows: the path relative to the input folder, with forward slashes.
    path
        The file.
    """

    key: str
    path: Path


@dataclass(frozen=True)
class StoredImage:
    """An image that is not a local file, such as an object in a store.

    Parameters
    ----------
    key
        Key of the image's rows.
    read
        Returns its bytes, or the decoded image; raises `ImageError` on failure.
    beside
        Returns the bytes of the file of the same name with another suffix, such as ".jgw"; None if there is none.
    """

    key: str
    read: Callable[[], bytes | Image]
    beside: Callable[[str], bytes | None] | None = None


def find_images(folder: str | Path) -> list[ImageFile]:
    """List the images in a folder and its subfolders, sorted by key; for an image file, that file.

    Names that begin with a dot are skipped; links to folders are not followed. Bytes of a name that are not UTF-8
    appear in the key as `\\xNN`.

    Raises
    ------
    DataError
        The path does not exist, cannot be listed, or has no images.
    """
    folder = Path(folder)
    if folder.is_file() and folder.suffix.lower() in SUFFIXES:
        return [ImageFile(key_of(folder, folder.parent), folder)]
    if not folder.is_dir():
        raise DataError(f"{folder} is neither a folder of images nor an image")
    found = []
    for parent, folders, names in os.walk(folder, onerror=_unlistable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        found += [ImageFile(key_of(path, folder), path) for path in paths if path.suffix.lower() in SUFFIXES]
    if not found:
        raise DataError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))})")
    return sorted(found, key=lambda file: file.key)


def _unlistable(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be listed: {error.strerror}") from error


def key_of(path: Path, folder: Path) -> str:
    """Return the key of the rows of an image: its path relative to `folder`, with forward slashes."""
    return os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "backslashreplace")


def load_image(
    source: str | Path | bytes | Image, size: Grid, max_pixels: int = MAX_PIXELS, out: Image | None = None
) -> Image:
    """Read an image and resize it.

    Parameters
    ----------
    source
        A path, the bytes of a file, or an (H, W, 3) uint8 RGB array.
    size
        Height and width of the result.
    max_pixels
        Larger files are refused before decoding; arrays are not checked.
    out
        Output array, (*size, 3) uint8, C-contiguous; by default a new array, or `source` itself if it is a C-contiguous
        array of this size.

    Returns
    -------
    numpy.ndarray
        (H, W, 3) uint8, RGB, C-contiguous.

    Raises
    ------
    ImageError
        Unreadable, empty, truncated, corrupt, oversized, not an image, or an array of a wrong shape or dtype.
    """
    if isinstance(source, np.ndarray):
        if source.ndim != 3 or source.shape[2] != 3 or source.dtype != np.uint8 or not source.size:
            raise ImageError(f"an image array must be (H, W, 3) uint8 RGB, found {source.shape} {source.dtype}")
        return resize(reduce(source, size), size, out)
    return resize(decode(source if isinstance(source, bytes) else read_file(source), size, max_pixels), size, out)


def to_array(source: object) -> object:
    """Return a PIL image or a torch tensor as an (H, W, 3) array, and any other object unchanged.

    A tensor is (H, W, 3) or (3, H, W). Neither library is imported.

    Raises
    ------
    ImageError
        The object cannot be converted, such as a truncated file that PIL reads only now.
    """
    if isinstance(source, np.ndarray | bytes):
        return source
    libraries = {cls.__module__.partition(".")[0] for cls in type(source).__mro__}
    image: Any = source
    try:
        if "PIL" in libraries and hasattr(source, "convert"):
            return np.asarray(image.convert("RGB"))
        if "torch" in libraries and hasattr(source, "detach"):
            array = np.asarray(image.detach().cpu().numpy())
            return array.transpose(1, 2, 0) if array.ndim == 3 and array.shape[0] == 3 != array.shape[2] else array
    except (OSError, SyntaxError, TypeError, ValueError, RuntimeError) as error:
        raise ImageError(f"cannot be converted to an array: {error}") from error
    return source


def read_file(path: str | Path) -> bytes:
    """Return the bytes of an image file.

    Raises
    ------
    ImageError
        The file cannot be read.
    """
    try:
        if is_special(path):
            raise ImageError("cannot be read: not a regular file")
        status = Path(path).stat()
        refuse_large(status.st_size)
        with Path(path).open("rb") as file:
            return file.read(status.st_size)  # at most: a file that grows, or one in /proc, may not end
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL byte in the name
        raise ImageError(f"cannot be read: {error}") from error


def refuse_large(size: int) -> None:
    """Raise ImageError for a file of more than `MAX_FILE_BYTES`."""
    if size > MAX_FILE_BYTES:
        raise ImageError(f"is oversized: {size:,} bytes are more than {MAX_FILE_BYTES:,}")


def decode(data: bytes, cover: Grid | None = None, max_pixels: int = MAX_PIXELS) -> Image:
    """Decode the bytes of an image file to (H, W, 3) uint8 RGB.

    Parameters
    ----------
    data
        The bytes of the file.
    cover
        A JPEG is decoded at the smallest scale whose height and width are at least these; other images, and JPEGs in
        CMYK or with EXIF data, are decoded at full size and reduced to that scale. None decodes at full size; the
        result equals cv2.imread in colour, including EXIF rotation.
    max_pixels
        Larger images are refused before decoding.

    Raises
    ------
    ImageError
        Empty, truncated, corrupt, oversized, or not an image.
    """
    if not data:
        raise ImageError("is empty")
    if data[:2] == b"\xff\xd8":
        return _decode_jpeg(data, cover, max_pixels)
    _refuse_oversized(*stated_size(data), max_pixels)
    if data[:2] in (b"II", b"MM"):
        check_tiff(data)
    try:
        image = _decode_opencv(drop_ancillary_chunks(data))
    except ImageError as error:
        if data[:2] not in (b"II", b"MM"):
            raise
        raise ImageError(f"{error}; a TIFF must have 8 or 16 bits per channel, not floating-point numbers") from error
    return image if cover is None else reduce(image, cover)


def is_plain_jpeg(data: bytes, max_pixels: int = MAX_PIXELS) -> bool:
    """Return whether the bytes are a complete JPEG in RGB, YCbCr or grey without EXIF data.

    Raises
    ------
    ImageError
        The header is damaged, or the image has more than `max_pixels` pixels, `MAX_SCANS` scans or `MAX_SEGMENTS`
        segments.
    """
    if data[:2] != b"\xff\xd8":
        return False
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise ImageError(f"{_DAMAGED}: {error}") from error
    _refuse_oversized(height, width, max_pixels)
    _refuse_scans(data)
    return colorspace in _PLAIN and has_end(data) and not has_exif(data)


_PLAIN = ("YCbCr", "Gray", "RGB")
_DAMAGED = "is a damaged JPEG, or of a kind that cannot be checked"


def _decode_jpeg(data: bytes, cover: Grid | None, max_pixels: int) -> Image:
    height, width = cover or (0, 0)
    try:
        full_height, full_width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _refuse_oversized(full_height, full_width, max_pixels)
        _refuse_scans(data)
        if colorspace not in _PLAIN or has_exif(data):
            # OpenCV handles EXIF rotation and CMYK, but fills damaged parts with grey: libjpeg-turbo detects them.
            simplejpeg.decode_jpeg(data, "CMYK" if colorspace in ("CMYK", "YCCK") else "RGB", min_height=1, min_width=1)
            image = _decode_opencv(data)
            return image if cover is None else reduce(image, cover)
        return np.asarray(simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width))
    except ValueError as error:
        raise ImageError(f"{_DAMAGED}: {error}") from error


def _decode_opencv(data: bytes) -> Image:
    buffer = np.frombuffer(data, np.uint8)
    try:
        decoded = cv2.imdecode(buffer, cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise ImageError(f"cannot be decoded: {error.err}") from error
    if decoded is None:
        raise ImageError("is damaged, or of a kind that cannot be decoded")
    return np.asarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), np.uint8)


def _refuse_scans(jpeg: bytes) -> None:
    if jpeg.count(b"\xff\xda") > MAX_SCANS:
        raise ImageError(f"is a JPEG with more than {MAX_SCANS} scans")


def _refuse_oversized(height: int, width: int, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"is empty: {width}x{height} pixels")
    if height * width > max_pixels:
        raise ImageError(f"is oversized: {width}x{height} is more than {max_pixels / 1e6:g} megapixels")
