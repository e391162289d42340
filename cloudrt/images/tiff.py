"""Size and checks of TIFF files, because OpenCV fills damaged and missing parts without an error."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Mapping
from io import BytesIO

from cloudrt.errors import ImageError
from cloudrt.labels import Grid

MAX_ENTRIES = 1_000
"""Limit of the entries of a TIFF directory."""
MAX_VALUES = 1_000_000
"""Limit of the numbers in an entry of a TIFF directory, such as the offsets of strips."""

FORMS = {
    b"II*\0": ("<", "I", "H", 12),
    b"MM\0*": (">", "I", "H", 12),
    b"II+\0": ("<", "Q", "Q", 20),
    b"MM\0+": (">", "Q", "Q", 20),
}
"""Signature -> byte order, formats of an offset and of the number of entries, bytes per entry."""
_INTEGERS = {3: "H", 4: "I", 16: "Q"}
_BYTES = (1, 2, 6, 7)
"""Types of bytes and text, which are not parsed to numbers."""
_TYPE_BYTES = {
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
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _STRIPS, _SAMPLES, _ROWS, _STRIP_BYTES = 256, 257, 258, 259, 273, 277, 278, 279
_PLANAR, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 284, 322, 323, 324, 325
_PARSED = (
    *(_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _STRIPS, _SAMPLES, _ROWS, _STRIP_BYTES),
    *(_PLANAR, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES),
)
_DEFLATE = (8, 32946)
_PIECE = 2**20
"""Bytes to decompress at once."""


def tiff_size(data: bytes) -> Grid:
    """Return height and width of a TIFF.

    Raises
    ------
    ImageError
        The file is truncated, or its first directory is damaged.
    struct.error
        The file ends inside a field.
    """
    tags = _tags(data)
    for places, lengths in ((_STRIPS, _STRIP_BYTES), (_TILES, _TILE_BYTES)):
        if places in tags and lengths in tags:
            for place, length in zip(tags[places], tags[lengths], strict=False):
                require_bytes(data, place + length)
    first = {tag: values[0] for tag, values in tags.items() if values}
    height, width = first.get(_HEIGHT), first.get(_WIDTH)
    if not height or not width:
        raise ImageError("is damaged: a TIFF file that does not state its size")
    strips = -(-height // (first.get(_ROWS) or height))
    tiles = -(-height // (first.get(_TILE_HEIGHT) or height)) * -(-width // (first.get(_TILE_WIDTH) or width))
    planes = first.get(_SAMPLES, 1) if first.get(_PLANAR) == 2 else 1
    for places, count in ((_STRIPS, strips), (_TILES, tiles)):
        if places in tags and len(tags[places]) < count * planes:  # libtiff would read the missing ones at offset 0
            raise ImageError(f"is damaged: a TIFF with {len(tags[places])} of {count * planes} strips or tiles")
    return height, width


def check_tiff(data: bytes) -> None:
    """Refuse a TIFF with damage inside its compressed data, or in a compression in which damage cannot be found.

    The checksums of deflate are verified here, because decoders ignore them. Pillow reports damage in other
    compressions. Uncompressed files are accepted: their only damage that can be detected is in the header.

    Parameters
    ----------
    data
        A file that `tiff_size` has verified.

    Raises
    ------
    ImageError
        The reason.
    """
    from PIL.TiffImagePlugin import TiffImageFile

    tags = _tags(data)
    compression = next(iter(tags.get(_COMPRESSION, ())), 1)
    if compression in _DEFLATE:
        _check_deflate(data, tags)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about sizes, which are already checked, and about unusual tags
        opened = False
        try:
            with TiffImageFile(BytesIO(data)) as image:  # Image.open would refuse large images
                opened = True
                image.load()
        except Exception as error:  # Pillow and its codecs raise many kinds for damaged files
            if opened or not isinstance(error, SyntaxError):
                raise ImageError(f"is a damaged TIFF: {error}") from error
            if compression not in (1, *_DEFLATE):
                raise ImageError("is a compressed TIFF of a kind that cannot be checked: save it in RGB") from error


def _check_deflate(data: bytes, tags: Mapping[int, tuple[int, ...]]) -> None:
    """Raise ImageError if a strip or tile has a wrong checksum, no end, or more bytes than its pixels."""
    first = {tag: values[0] for tag, values in tags.items() if values}
    depths, samples = tags.get(_BITS, ()) or (1,), first.get(_SAMPLES, 1)
    bits = sum(depths) if len(depths) > 1 else depths[0] * samples
    height, width = first[_HEIGHT], first[_WIDTH]
    for places, lengths, rows, columns in (
        (_STRIPS, _STRIP_BYTES, min(first.get(_ROWS) or height, height), width),
        (_TILES, _TILE_BYTES, first.get(_TILE_HEIGHT, 0), first.get(_TILE_WIDTH, 0)),
    ):
        if len(tags.get(lengths, ())) < len(tags.get(places, ())):
            raise ImageError("is damaged: a TIFF that does not state the size of each strip or tile")
        for place, length in zip(tags.get(places, ()), tags.get(lengths, ()), strict=False):
            if length:  # an empty tile is black
                _check_zlib(data[place : place + length], rows * -(-columns * bits // 8))


def _check_zlib(compressed: bytes, most: int) -> None:
    """Raise ImageError for a zlib stream with a wrong checksum, without its end, or of more than `most` bytes."""
    stream, piece = zlib.decompressobj(), compressed
    try:
        while not stream.eof:
            found = len(stream.decompress(piece, _PIECE))
            piece, most = stream.unconsumed_tail, most - found
            if most < 0:
                raise ImageError("is a damaged TIFF: a strip or tile in deflate compression is larger than its pixels")
            if not (found or piece or stream.eof):
                raise ImageError("is a damaged TIFF: a strip or tile in deflate compression has no end")
    except zlib.error as error:
        raise ImageError(f"is a damaged TIFF: {error}") from error


def _tags(data: bytes) -> dict[int, tuple[int, ...]]:
    """Parse the first directory (TIFF 6.0, section 2; BigTIFF has wider fields)."""
    order, offset_form, count_form, entry_size = FORMS[data[:4]]
    offset_size = struct.calcsize(offset_form)
    at = struct.unpack_from(order + offset_form, data, 4 if offset_size == 4 else 8)[0]
    require_bytes(data, at)
    entries = struct.unpack_from(order + count_form, data, at)[0]
    at += struct.calcsize(count_form)
    require_bytes(data, at + entries * entry_size + offset_size)  # the offset of the next directory comes last
    if entries > MAX_ENTRIES:
        raise ImageError(f"is damaged: a TIFF directory of {entries:,} entries")
    tags: dict[int, tuple[int, ...]] = {}
    total = 0
    for entry in range(at, at + entries * entry_size, entry_size):
        tag, kind, count = struct.unpack_from(f"{order}HH{offset_form}", data, entry)
        values, length = entry + 4 + offset_size, count * _TYPE_BYTES.get(kind, 0)
        if count > MAX_VALUES and kind not in _BYTES:
            raise ImageError(f"is damaged: a TIFF entry of {count:,} numbers")
        if length > offset_size:  # too long for the entry, which holds their offset
            values = struct.unpack_from(order + offset_form, data, values)[0]
        require_bytes(data, values + length)
        total += length
        if total > len(data):  # decoders copy the values of each entry
            raise ImageError("is damaged: the entries of its TIFF directory are larger than the file")
        if tag in _PARSED and tag not in tags and kind in _INTEGERS:  # the first of repeated tags, as libtiff
            tags[tag] = struct.unpack_from(f"{order}{count}{_INTEGERS[kind]}", data, values)
    return tags


def require_bytes(data: bytes, end: int) -> None:
    """Raise ImageError for a file that ends before byte `end`."""
    if end > len(data):
        raise ImageError(f"is truncated: {len(data)} bytes of at least {end}")
