"""Image files of every supported kind, as bytes; and `refusal`, the message for a file that is refused."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cloudrt.errors import ImageError
from cloudrt.images.image import load_image

HEIGHT, WIDTH = 90, 133


def picture(height: int = HEIGHT, width: int = WIDTH, channels: int = 3, sigma: float = 3) -> NDArray[np.uint8]:
    """A smooth (H, W, channels) uint8 picture of levels 0 to 255."""
    noise = cv2.GaussianBlur(np.random.default_rng(0).random((height, width, channels)), (0, 0), sigma)
    return np.asarray(cv2.normalize(noise, noise, 0, 255, cv2.NORM_MINMAX), np.uint8).reshape(height, width, channels)


def encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    """The bytes of a picture as Pillow writes them."""
    channels = {"L": 1, "LA": 2, "RGBA": 4, "CMYK": 4}.get(mode, 3)
    pixels = picture(channels=channels)
    if mode == "P":
        image = Image.fromarray(pixels).quantize(50)
    elif mode == "1":
        image = Image.fromarray(pixels).convert("1")
    elif mode == "I;16":
        image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257 + 3)
    else:
        image = Image.frombytes(mode, (WIDTH, HEIGHT), pixels.tobytes())
    if orientation := options.pop("orientation", None):
        options["exif"] = image.getexif()
        options["exif"][0x0112] = orientation
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def imread(path: Path) -> NDArray[np.uint8]:
    """The (H, W, 3) BGR pixels of a file that OpenCV reads."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    assert image is not None, path
    return np.asarray(image, np.uint8)


def opencv(kind: str, pixels: NDArray[Any], *options: int) -> bytes:
    """The bytes of a picture as OpenCV writes them."""
    done, data = cv2.imencode(kind, pixels, options)
    assert done
    return bytes(data.tobytes())


def sixteen_bits(channels: int) -> NDArray[np.uint16]:
    """A picture of (H, W, channels) 16-bit values."""
    return picture(channels=channels).astype(np.uint16) * 251 + 7


JPEGS: dict[str, Callable[[], bytes]] = {
    "4:2:0": lambda: encoded("JPEG"),
    "4:2:2": lambda: encoded("JPEG", subsampling=1),
    "4:4:4": lambda: encoded("JPEG", subsampling=0),
    "grey": lambda: encoded("JPEG", "L"),
    "progressive": lambda: encoded("JPEG", progressive=True),
    "progressive grey": lambda: encoded("JPEG", "L", progressive=True),
    "optimised": lambda: encoded("JPEG", optimize=True, quality=30),
    "best": lambda: encoded("JPEG", quality=100, subsampling=0),
    "restart markers": lambda: encoded("JPEG", restart_marker_blocks=3),
    "RGB inside": lambda: encoded("JPEG", keep_rgb=True),
    "CMYK": lambda: encoded("JPEG", "CMYK"),
    "comment": lambda: encoded("JPEG", comment=b"Exif\0\0 is only mentioned here"),
    "EXIF, upright": lambda: encoded("JPEG", orientation=1),
    "EXIF, mirrored": lambda: encoded("JPEG", orientation=2),
    "EXIF, upside down": lambda: encoded("JPEG", orientation=3),
    "EXIF, flipped": lambda: encoded("JPEG", orientation=4),
    "EXIF, transposed": lambda: encoded("JPEG", orientation=5),
    "EXIF, turned right": lambda: encoded("JPEG", orientation=6),
    "EXIF, transversed": lambda: encoded("JPEG", orientation=7),
    "EXIF, turned left": lambda: encoded("JPEG", "L", orientation=8),
    "EXIF after long comments": lambda: with_comments(encoded("JPEG", orientation=6)),
    "EXIF after markers without a length": lambda: with_markers(encoded("JPEG", orientation=6), b"\xff\xd0\xff\x01"),
    "trailing data": lambda: encoded("JPEG") + b"a trailer that some cameras write",
}
OTHERS: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: encoded("PNG"),
    "PNG, grey": lambda: encoded("PNG", "L"),
    "PNG, alpha": lambda: encoded("PNG", "RGBA"),
    "PNG, grey and alpha": lambda: encoded("PNG", "LA"),
    "PNG, palette": lambda: encoded("PNG", "P"),
    "PNG, one bit": lambda: encoded("PNG", "1"),
    "PNG, 16-bit grey": lambda: encoded("PNG", "I;16"),
    "PNG, 16-bit": lambda: opencv(".png", sixteen_bits(3)),
    "PNG, 16-bit alpha": lambda: opencv(".png", sixteen_bits(4)),
    "PNG, EXIF": lambda: encoded("PNG", orientation=6),
    "PNG, animated": lambda: encoded("PNG", save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))]),
    "PNG, trailing data": lambda: encoded("PNG") + b"trailer",
    "WebP": lambda: encoded("WEBP"),
    "WebP, lossless": lambda: encoded("WEBP", lossless=True),
    "WebP, alpha": lambda: encoded("WEBP", "RGBA"),
    "WebP, lossless alpha": lambda: encoded("WEBP", "RGBA", lossless=True),
    "TIFF": lambda: encoded("TIFF"),
    "TIFF, grey": lambda: encoded("TIFF", "L"),
    "TIFF, LZW": lambda: encoded("TIFF", compression="tiff_lzw"),
    "TIFF, deflate": lambda: encoded("TIFF", compression="tiff_adobe_deflate"),
    "TIFF, JPEG": lambda: encoded("TIFF", compression="jpeg"),
    "TIFF, big": lambda: encoded("TIFF", big_tiff=True),
    "TIFF, OpenCV": lambda: opencv(".tiff", picture()),
    "TIFF, 16-bit": lambda: opencv(".tiff", sixteen_bits(3)),
    "TIFF, 7 rows per strip": lambda: opencv(".tiff", picture(), cv2.IMWRITE_TIFF_ROWSPERSTRIP, 7),
    "BMP": lambda: encoded("BMP"),
    "BMP, grey": lambda: encoded("BMP", "L"),
    "BMP, OpenCV": lambda: opencv(".bmp", picture()),
}
FILES = JPEGS | OTHERS


def with_markers(jpeg: bytes, markers: bytes) -> bytes:
    """Insert markers after the first one."""
    return jpeg[:2] + markers + jpeg[2:]


def with_comments(jpeg: bytes) -> bytes:
    """Insert two comments of 60,000 bytes after the first segment."""
    first = 4 + int.from_bytes(jpeg[4:6], "big")
    comment = b"\xff\xfe" + struct.pack(">H", 60_002) + bytes(60_000)
    return jpeg[:first] + 2 * comment + jpeg[first:]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(height: int, width: int, rows: bytes = b"") -> bytes:
    """An 8-bit RGB PNG that states a size, with `rows` as its data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def jpeg(height: int, width: int) -> bytes:
    """A JPEG whose frame header states a size that its data do not have."""
    data = bytearray(encoded("JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def refusal(source: Any, **options: Any) -> str:
    """The message, one line, of the error that loading an image raises."""
    with pytest.raises(ImageError) as caught:
        load_image(source, (30, 40), **options)
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1
    return message
