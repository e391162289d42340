"""Files that are refused by their header: not an image, too large, or without pixels."""

from __future__ import annotations

import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from support.pictures import FILES, HEIGHT, WIDTH, jpeg, png, refusal

from cloudrt.errors import ImageError
from cloudrt.images.image import decode, load_image


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"not an image at all\n", "is not a JPEG, PNG, WebP, TIFF or BMP image"),
        (bytes(1000), "is not a JPEG"),
        (b"\xff\xd8", "damaged JPEG"),
        (b"\xff\xd8\xff\xd9", "damaged JPEG"),
        (b"\xff\xd8" + bytes(500), "damaged JPEG"),
        (b"\xff\xd8\xff\xe1\xff", "damaged JPEG"),
        (b"\x89PNG\r\n\x1a\n", "truncated"),
        (b"RIFF\x04\0\0\0WEBP", "damaged"),
        (b"RIFF\xff\xff\xff\xffWEBPVP8 ", "truncated"),
        (b"II*\0\xff\xff\xff\xff", "truncated"),
        (b"II*\0\x08\0\0\0\0\0\0\0\0\0", "does not state its size"),
        (b"MM\0*\0\0\0\x08\xff\xff", "truncated"),
        (b"BM", "truncated"),
        (b"GIF89a" + bytes(50), "is not a JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a JPEG"),
        (b"P6 2 2 255 abcabcabcabc", "is not a JPEG"),
    ],
)
def test_what_is_no_image(data: bytes, reason: str) -> None:
    assert reason in refusal(data)


def test_noise_behind_each_signature_is_refused_and_crashes_nothing() -> None:
    rng = np.random.default_rng(0)
    signatures = [data()[:length] for data in FILES.values() for length in (4, 16, 40)]
    for index, signature in enumerate(signatures):
        with pytest.raises(ImageError):
            decode(signature + rng.bytes(index * 7 % 400), max_pixels=1_000_000)


def webp(height: int, width: int) -> bytes:
    body = b"VP8X" + struct.pack("<II", 10, 0) + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def webp_lossless(height: int, width: int) -> bytes:
    body = b"VP8L" + struct.pack("<IBI", 5, 0x2F, (height - 1) << 14 | (width - 1)) + b"\0"
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def tiff(height: int, width: int, order: str = "<") -> bytes:
    entries = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 2)]
    directory = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in entries)
    count = struct.pack(order + "H", len(entries))
    return {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8) + count + directory + bytes(4)


def bmp(height: int, width: int) -> bytes:
    """Run-length encoded, so that the header does not state the length of the file."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 2, 0, 0, 1, 0)
    return b"BM" + struct.pack("<IHHI", 60, 0, 0, 58) + header + bytes(4) + b"\0\1"


BOMBS: dict[str, bytes] = {
    "PNG": png(60_000, 60_000),
    "PNG, largest": png(2**31 - 1, 2**31 - 1),
    "JPEG": jpeg(60_000, 60_000),
    "WebP": webp(60_000, 60_000),
    "WebP, largest": webp(2**24, 2**24),
    "WebP, lossless": webp_lossless(16_384, 16_384),
    "TIFF": tiff(60_000, 60_000),
    "TIFF, big-endian": tiff(60_000, 60_000, ">"),
    "TIFF, largest": tiff(2**32 - 1, 2**32 - 1),
    "BMP": bmp(60_000, 60_000),
    "BMP, upside down": bmp(-60_000, 60_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_oversized_headers_are_refused(name: str) -> None:
    message = refusal(BOMBS[name])
    assert "is oversized" in message and "more than 100 megapixels" in message


def test_oversized_headers_are_refused_without_allocating(tmp_path: Path) -> None:
    """In a process that can allocate less than a twentieth of the 10.8 GB that 60,000 x 60,000 pixels take."""
    for name, data in BOMBS.items():
        (tmp_path / name.replace(", ", "-")).write_bytes(data)
    script = textwrap.dedent("""
        import resource, sys
        from pathlib import Path
        from cloudrt.errors import ImageError
        from cloudrt.images.image import load_image
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for path in Path(sys.argv[1]).iterdir():
            try:
                load_image(path, (30, 40))
            except ImageError as error:
                assert "oversized" in str(error), (path, error)
            else:
                raise AssertionError(path)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """)
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux's /proc")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # OpenCV, which would print a message, was not called
    assert int(done.stdout) * 1024 < 16 * 2**20


def test_the_limit_is_inclusive_and_can_be_set() -> None:
    for data in (FILES["PNG"](), FILES["4:2:0"](), FILES["EXIF, turned right"]()):
        assert load_image(data, (30, 40), max_pixels=HEIGHT * WIDTH).shape == (30, 40, 3)
        assert "is oversized" in refusal(data, max_pixels=HEIGHT * WIDTH - 1)


@pytest.mark.parametrize("data", [png(0, 10), png(10, 0), bmp(10, 0), bmp(10, -5), tiff(0, 10), jpeg(10, 0)])
def test_images_without_pixels(data: bytes) -> None:
    assert refusal(data)
