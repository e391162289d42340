"""Parsing and validation of image headers before decoding: the size in pixels, and whether the file is complete.

OpenCV allocates memory for an image before its size can be checked, and some versions fill missing parts of an image
without an error. Here the size is parsed first, and the lengths and checksums of the format are verified: the CRC of
each PNG chunk, the RIFF length of WebP, strips and tiles of TIFF, the rows of BMP. Compressed data of WebP and TIFF
have no checksums; only the decoder can detect damage inside them.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from cloudrt.errors import ImageError
from cloudrt.labels import Grid

PNG = b"\x89PNG\r\n\x1a\n"

MAX_PIXELS = 100_000_000
"""Default limit of the number of pixels of an image."""

# Limits of parts that take time or memory to parse, whatever their size. Usual files have far fewer.
MAX_SEGMENTS = 10_000
"""Limit of the segments of a JPEG before its first scan."""
MAX_CHUNKS = 200_000
"""Limit of the chunks of a PNG; 1 GiB of image data in chunks of 8 KiB, which libpng writes, are 131,072."""
MAX_ENTRIES = 1_000
"""Limit of the entries of a TIFF directory."""
MAX_VALUES = 1_000_000
"""Limit of the numbers in an entry of a TIFF directory, such as the offsets of strips."""


def stated_size(data: bytes) -> Grid:
    """Return height and width of a PNG, WebP, TIFF or BMP image from its header.

    Parameters
    ----------
    data
        The bytes of the file.

    Raises
    ------
    ImageError
        The file is truncated, has a wrong checksum, or has another format.
    """
    try:
        if data.startswith(PNG):
            return _png(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
        if data[:4] in _TIFF_FORMS:
            return _tiff(data)
        if data[:2] == b"BM":
            return _bmp(data)
    except struct.error as error:
        raise ImageError(f"is truncated: {len(data)} bytes end inside its header") from error
    raise ImageError("is not a JPEG, PNG, WebP, TIFF or BMP image")


def has_exif(jpeg: bytes) -> bool:
    """Return whether a JPEG has EXIF data, which may contain a rotation, before its first scan."""
    return any(marker == 0xE1 and jpeg[at + 4 : at + 10] == b"Exif\0\0" for marker, at in _segments(jpeg))


def has_end(jpeg: bytes) -> bool:
    """Return whether the end marker of a JPEG follows its first scan; it is missing in truncated files."""
    scan = next((at for marker, at in _segments(jpeg) if marker == 0xDA), None)
    return scan is not None and jpeg.find(b"\xff\xd9", scan) >= 0  # within a scan, 0xFF bytes are followed by 0


def _segments(jpeg: bytes) -> Iterator[tuple[int, int]]:
    """Yield the marker and position of each segment up to the first scan (ITU T.81, B.1.1).

    Fill bytes and markers without a length count as segments.
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


def _need(data: bytes, end: int) -> None:
    if end > len(data):
        raise ImageError(f"is truncated: {len(data)} bytes of at least {end}")


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
        _need(data, end + 4)
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
    _need(data, 8 + struct.unpack_from("<I", data, 4)[0])
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
        _need(data, first + (max(width, 0) * bits + 31) // 32 * 4 * height)
    return height, width


# Signature: byte order, formats of an offset and of the number of entries, bytes per entry.
_TIFF_FORMS = {
    b"II*\0": ("<", "I", "H", 12),
    b"MM\0*": (">", "I", "H", 12),
    b"II+\0": ("<", "Q", "Q", 20),
    b"MM\0+": (">", "Q", "Q", 20),
}
_TIFF_INTEGERS = {3: "H", 4: "I", 16: "Q"}
_TIFF_BYTES = (1, 2, 6, 7)
"""Types of bytes and text, which are not parsed to numbers."""
_TIFF_TYPE_BYTES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
_WIDTH, _HEIGHT, _COMPRESSION, _STRIPS, _SAMPLES, _ROWS, _STRIP_BYTES = 256, 257, 259, 273, 277, 278, 279
_PLANAR, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 284, 322, 323, 324, 325
_PARSED = (256, 257, 259, 273, 277, 278, 279, 284, 322, 323, 324, 325)


def is_compressed_tiff(data: bytes) -> bool:
    """Return whether a TIFF that `stated_size` has verified is compressed."""
    return _tiff_tags(data).get(_COMPRESSION, (1,))[:1] != (1,)


def _tiff(data: bytes) -> Grid:
    tags = _tiff_tags(data)
    for places, lengths in ((_STRIPS, _STRIP_BYTES), (_TILES, _TILE_BYTES)):
        if places in tags and lengths in tags:
            for place, length in zip(tags[places], tags[lengths], strict=False):
                _need(data, place + length)
    first = {tag: values[0] for tag, values in tags.items() if values}
    height, width = first.get(_HEIGHT), first.get(_WIDTH)
    if not height or not width:
        raise ImageError("is damaged: a TIFF file that does not state its size")
    strips = -(-height // (first.get(_ROWS) or height))
    tiles = -(-height // (first.get(_TILE_HEIGHT) or height)) * -(-width // (first.get(_TILE_WIDTH) or width))
    planes = first.get(_SAMPLES, 1) if first.get(_PLANAR) == 2 else 1
    for places, count in ((_STRIPS, strips), (_TILES, tiles)):
        if places in tags and len(tags[places]) < count * planes:  # libtiff reads the others at the start of the file
            raise ImageError(f"is damaged: a TIFF with {len(tags[places])} of {count * planes} strips or tiles")
    return height, width


def _tiff_tags(data: bytes) -> dict[int, tuple[int, ...]]:
    """Parse the first directory (TIFF 6.0, section 2; BigTIFF has wider fields)."""
    order, offset_form, count_form, entry_size = _TIFF_FORMS[data[:4]]
    offset_size = struct.calcsize(offset_form)
    at = struct.unpack_from(order + offset_form, data, 4 if offset_size == 4 else 8)[0]
    _need(data, at)
    entries = struct.unpack_from(order + count_form, data, at)[0]
    at += struct.calcsize(count_form)
    _need(data, at + entries * entry_size + offset_size)  # the offset of the next directory comes last
    if entries > MAX_ENTRIES:
        raise ImageError(f"is damaged: a TIFF directory of {entries:,} entries")
    tags: dict[int, tuple[int, ...]] = {}
    total = 0
    for entry in range(at, at + entries * entry_size, entry_size):
        tag, kind, count = struct.unpack_from(f"{order}HH{offset_form}", data, entry)
        values, length = entry + 4 + offset_size, count * _TIFF_TYPE_BYTES.get(kind, 0)
        if count > MAX_VALUES and kind not in _TIFF_BYTES:
            raise ImageError(f"is damaged: a TIFF entry of {count:,} numbers")
        if length > offset_size:  # too long for the entry, which holds their offset
            values = struct.unpack_from(order + offset_form, data, values)[0]
        _need(data, values + length)
        total += length
        if total > len(data):  # decoders copy the values of each entry
            raise ImageError("is damaged: the entries of its TIFF directory are larger than the file")
        if tag in _PARSED and tag not in tags and kind in _TIFF_INTEGERS:  # the first of repeated tags, as libtiff
            tags[tag] = struct.unpack_from(f"{order}{count}{_TIFF_INTEGERS[kind]}", data, values)
    return tags
