"""Find, decode and resize images: the one code path of training, tuning and inference.

A JPEG is decoded at the smallest of libjpeg-turbo's DCT scales that still covers the wanted size, then brought to it by
one resize; damaged files raise `ImageError` instead of coming back grey. PNG, WebP, TIFF and BMP go through OpenCV,
once their headers are found sound and not too large.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from cloudrt.errors import DataError, ImageError
from cloudrt.images.headers import MAX_PIXELS, has_end, has_exif, stated_size
from cloudrt.labels import Grid

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"})
NO_DATA_LEVEL = 8
"""A pixel whose brightest channel is at most this has no data: the swath bands are black but for JPEG's ringing."""

Image = NDArray[np.uint8]
"""(H, W, 3) uint8, RGB."""


@dataclass(frozen=True)
class ImageFile:
    """An image on disk and the key of its rows: the path relative to the input folder, with forward slashes."""

    key: str
    path: Path


@dataclass(frozen=True)
class StoredImage:
    """An image that lies elsewhere than on a disk here.

    Parameters
    ----------
    key
        Of its rows.
    read
        Gives its bytes, or the image itself, when its turn comes; raises `ImageError` where it cannot.
    """

    key: str
    read: Callable[[], bytes | Image]


def find_images(folder: str | Path) -> list[ImageFile]:
    """List the images below `folder`, subfolders included, in the order of their keys.

    What begins with a dot is hidden; links to folders are not followed. A byte of a name that is not UTF-8 stands in
    the key as `\\xNN`.

    Raises
    ------
    DataError
        No such folder, a folder in it that cannot be listed, or no image in it.
    """
    folder = Path(folder)
    if folder.is_file() and folder.suffix.lower() in SUFFIXES:
        return [ImageFile(folder.name, folder)]
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
    """Return the key of an image's rows: its path relative to `folder`, with forward slashes."""
    return os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "backslashreplace")


def load_image(
    source: str | Path | bytes | Image, size: Grid, max_pixels: int = MAX_PIXELS, out: Image | None = None
) -> Image:
    """Read one image and bring it to `size`.

    Parameters
    ----------
    source
        A path, the bytes of a file, or an (H, W, 3) uint8 RGB array.
    size
        Height and width of the result.
    max_pixels
        Larger images are refused before they are decoded.
    out
        Where to write the result: of `size`, C-contiguous. A new array where it is None.

    Returns
    -------
    numpy.ndarray
        (H, W, 3) uint8, RGB, C-contiguous.

    Raises
    ------
    ImageError
        Unreadable, empty, truncated, corrupt, oversized, no image, or an array of another form.
    """
    if isinstance(source, np.ndarray):
        if source.ndim != 3 or source.shape[2] != 3 or source.dtype != np.uint8 or not source.size:
            raise ImageError(f"an image array is (H, W, 3) uint8 RGB, found {source.shape} {source.dtype}")
        return resize(source, size, out)
    return resize(decode(source if isinstance(source, bytes) else read_file(source), size, max_pixels), size, out)


def read_file(path: str | Path) -> bytes:
    """Return the bytes of an image file.

    Raises
    ------
    ImageError
        It cannot be read.
    """
    try:
        mode = Path(path).stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # reading a pipe would never end
            raise ImageError("cannot be read: no regular file")
        return Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a name with a NUL byte
        raise ImageError(f"cannot be read: {error}") from error


def resize(image: Image, size: Grid, out: Image | None = None) -> Image:
    """Bring an image to `size` (height, width): averaged over areas where it shrinks, bilinear where it grows.

    The result is written to `out` where it is given.
    """
    height, width = size
    image = np.ascontiguousarray(image)
    # Two steps where one side shrinks and the other grows: OpenCV averages over areas only if neither grows.
    smaller = min(height, image.shape[0]), min(width, image.shape[1])
    for (rows, columns), method in ((smaller, cv2.INTER_AREA), (size, cv2.INTER_LINEAR)):
        if image.shape[:2] != (rows, columns):
            target = out if (rows, columns) == size else None
            image = np.asarray(cv2.resize(image, (columns, rows), dst=target, interpolation=method), np.uint8)
    if out is None or image is out:
        return image
    out[...] = image
    return out


def decode(data: bytes, cover: Grid | None = None, max_pixels: int = MAX_PIXELS) -> Image:
    """Decode an image file's bytes to (H, W, 3) uint8 RGB, at full size or at the smallest scale that covers `cover`.

    At full size the answer is that of cv2.imread in colour, EXIF rotation included.

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
    return _decode_opencv(data)


def is_plain_jpeg(data: bytes, max_pixels: int = MAX_PIXELS) -> bool:
    """Whether an image is a whole JPEG that needs no more than decoding: no inks, no rotation, no cut.

    Raises
    ------
    ImageError
        A damaged header, or oversized.
    """
    if data[:2] != b"\xff\xd8":
        return False
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise ImageError(f"{_DAMAGED}: {error}") from error
    _refuse_oversized(height, width, max_pixels)
    return colorspace in _PLAIN and has_end(data) and not has_exif(data)


_PLAIN = ("YCbCr", "Gray", "RGB")
_DAMAGED = "is a damaged JPEG, or of a kind that cannot be checked"


def _decode_jpeg(data: bytes, cover: Grid | None, max_pixels: int) -> Image:
    height, width = cover or (0, 0)
    try:
        full_height, full_width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _refuse_oversized(full_height, full_width, max_pixels)
        if colorspace not in _PLAIN or has_exif(data):
            # OpenCV knows the rotations of EXIF and the inks of CMYK, but paints holes grey: look for those first.
            simplejpeg.decode_jpeg(data, "CMYK" if colorspace in ("CMYK", "YCCK") else "RGB", min_height=1, min_width=1)
            return _decode_opencv(data)
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


def _refuse_oversized(height: int, width: int, max_pixels: int) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"is empty: {width}x{height} pixels")
    if height * width > max_pixels:
        raise ImageError(f"is oversized: {width}x{height} is more than {max_pixels / 1e6:g} megapixels")
