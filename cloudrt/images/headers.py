"""Parsing and validation of image headers before decoding: the size in pixels, and whether the file is complete.

OpenCV allocates memory for an image before its size can be checked, and some versions fill missing parts of an image
without an error. Here the size is parsed first, and the lengths and checksums of the format are verified: the CRC of
each PNG chunk, the RIFF length of WebP, the rows of BMP. The data of WebP has no checksum; only the decoder can detect
damage inside it. For TIFF, see `cloudrt.images.tiff`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from cloudrt.errors import ImageError
from cloudrt.images.tiff import FORMS, require_bytes, tiff_size
from cloudrt.labels import Grid

PNG = b"\x89PNG\r\n\x1a\n"

MAX_PIXELS = 100_000_000
"""Default limit of the number of pixels of an image."""

# Limits of the number of parts: parsing many takes time and memory, however small they are. Usual files have far fewer.
MAX_SEGMENTS = 10_000
"""Limit of the segments of a JPEG before its first scan."""
MAX_CHUNKS = 200_000
"""Limit of the chunks of a PNG; 1 GiB of image data in chunks of 8 KiB, which libpng writes, are 131,072."""


def stated_size(data: bytes) -> Grid:
    """Return height and width of a PNG, WebP, TIFF or BMP image from its header.

    Parameters
    ----------
    data
        The bytes of the file.

    Raises
    ------
    ImageError
        The file is truncated or damaged, or has another format.
    """
    try:
        if data.startswith(PNG):
            return _png(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
        if data[:4] in FORMS:
            return tiff_size(data)
        if data[:2] == b"BM":
            return _bmp(data)
    except struct.error as error:
        raise ImageError(f"is truncated: {len(data)} bytes end inside its header") from error
    raise ImageError("is not a JPEG, PNG, WebP, TIFF or BMP image")


def has_exif(jpeg: bytes) -> bool:
    """Return whether a JPEG has EXIF data, which may contain a rotation, before its first scan.

    Raises
    ------
    ImageError
        More than `MAX_SEGMENTS` segments.
    """
    return any(marker == 0xE1 and jpeg[at + 4 : at + 10] == b"Exif\0\0" for marker, at in _segments(jpeg))


def has_end(jpeg: bytes) -> bool:
    """Return whether the end marker of a JPEG follows its first scan; it is missing in truncated files.

    Raises
    ------
    ImageError
        More than `MAX_SEGMENTS` segments.
    """
    scan = next((at for marker, at in _segments(jpeg) if marker == 0xDA), None)
    return scan is not None and jpeg.find(b"\xff\xd9", scan) >= 0  # in a scan, 0 or a restart marker follows 0xFF


def _segments(jpeg: bytes) -> Iterator[tuple[int, int]]:
    """Yield the marker and position of each segment up to the first scan (ITU T.81, B.1.1).

    Fill bytes and markers without a length are not yielded, but count towards `MAX_SEGMENTS`.
    """
    at = 2
    for _ in range(MAX_SEGMENTS):
        if at + 4 > len(jpeg) or jpeg[at] != 0xFF:
            return
        marker = jpeg[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker in _ALONE:
            at += 2
            continue
        yield marker, at
        if marker == 0xDA:
            return
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    raise ImageError(f"is a JPEG with more than {MAX_SEGMENTS:,} segments before its first scan")


_ALONE = (0x01, *range(0xD0, 0xD8))
"""Markers without a length, TEM and RST: libjpeg skips those before the first scan."""


def _png(data: bytes) -> Grid:
    view = memoryview(data)
    at = len(PNG)
    kind, count = b"", 0
    while kind != b"IEND":
        count += 1
        if count > MAX_CHUNKS:
            raise ImageError(f"is a PNG with more than {MAX_CHUNKS:,} chunks")
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        require_bytes(data, end + 4)
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ImageError(f"is damaged: the PNG chunk at byte {at} has a wrong checksum")
        at = end + 4
    width, height = struct.unpack_from(">II", data, 16)
    return height, width


def drop_ancillary_chunks(data: bytes) -> bytes:
    """Return a PNG without the ancillary chunks that do not change its pixels, such as colour profiles and texts.

    libpng prints its warnings about them to stderr, whatever the log level of OpenCV is. Animation is removed too: the
    first image is the same, and OpenCV leaves rows uninitialised if the data of an animated image is damaged. Other
    data is returned as it is.

    Parameters
    ----------
    data
        A file whose chunks `stated_size` has verified.
    """
    if not data.startswith(PNG):
        return data
    view, kept, begin, at = memoryview(data), [], 0, len(PNG)
    kind = b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind[0] & 0x20 and kind not in _PIXEL_CHUNKS:  # a lower-case letter: an ancillary chunk
            kept.append(view[begin:at])
            begin = end
        at = end
    return b"".join([*kept, view[begin:]]) if kept else data


_PIXEL_CHUNKS = (b"tRNS", b"bKGD", b"eXIf")
"""Ancillary chunks that may change pixels: transparency, background and rotation."""


def _webp(data: bytes) -> Grid:
    require_bytes(data, 8 + struct.unpack_from("<I", data, 4)[0])
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = struct.unpack_from("<I", data, 24)[0], struct.unpack_from("<I", data, 26)[0] >> 8
        return (height & 0xFFFFFF) + 1, (width & 0xFFFFFF) + 1
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF
    raise ImageError("is damaged: a WebP file without an image in its first chunk")


def _bmp(data: bytes) -> Grid:
    first, header = struct.unpack_from("<II", data, 10)
    if header == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = 0
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
        height = abs(height)
    if compression in (0, 3):  # uncompressed rows, padded to four bytes
        require_bytes(data, first + (max(width, 0) * bits + 31) // 32 * 4 * height)
    return height, width
