"""Damage inside the data of each accepted format, at 200 random places: how much of it is found.

The documentation states these shares (docs/explanation/decoding.md). PNG has checksums; compressed TIFF mostly fails
to decode; the others contain nothing that shows the damage.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from cloudrt.errors import ImageError
from cloudrt.images import headers
from cloudrt.images.image import MAX_FILE_BYTES, MAX_SCANS, decode, read_file

PLACES = 200


def picture() -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (233, 350, 3), np.uint8)
    smooth = cv2.GaussianBlur(noise, (0, 0), 4)
    return np.asarray(cv2.normalize(smooth, smooth, 0, 255, cv2.NORM_MINMAX), np.uint8)


def encoded(suffix: str, *options: int) -> bytes:
    done, data = cv2.imencode(suffix, picture(), options)
    assert done
    return data.tobytes()


def silent(data: bytes) -> float:
    """Return the share of places where 64 bytes of zeros change the picture without an error."""
    sound, draw, passed = decode(data), random.Random(1), 0
    for _ in range(PLACES):
        at = draw.randrange(len(data) - 64)
        try:
            found = decode(data[:at] + bytes(64) + data[at + 64 :])
        except ImageError:
            continue
        passed += found.shape != sound.shape or not np.array_equal(found, sound)
    return passed / PLACES


@pytest.mark.parametrize(
    ("data", "most"),
    [
        pytest.param(encoded(".png"), 0.0, id="PNG"),
        pytest.param(encoded(".jpg", cv2.IMWRITE_JPEG_QUALITY, 90), 1.0, id="JPEG"),
        pytest.param(encoded(".tif", cv2.IMWRITE_TIFF_COMPRESSION, 5), 0.02, id="TIFF, LZW"),
        pytest.param(encoded(".tif", cv2.IMWRITE_TIFF_COMPRESSION, 8), 0.02, id="TIFF, deflate"),
        pytest.param(encoded(".tif", cv2.IMWRITE_TIFF_COMPRESSION, 32773), 1.0, id="TIFF, PackBits"),
        pytest.param(encoded(".tif", cv2.IMWRITE_TIFF_COMPRESSION, 1), 1.0, id="TIFF"),
        pytest.param(encoded(".webp", cv2.IMWRITE_WEBP_QUALITY, 90), 1.0, id="WebP"),
        pytest.param(encoded(".webp", cv2.IMWRITE_WEBP_QUALITY, 101), 1.0, id="WebP, lossless"),
        pytest.param(encoded(".bmp"), 1.0, id="BMP"),
    ],
)
def test_damage_is_found_where_the_format_allows(data: bytes, most: float, capfd: pytest.CaptureFixture[str]) -> None:
    share = silent(data)
    capfd.readouterr()  # what the decoders print of it
    assert share <= most


def test_files_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.jpg"
    with path.open("wb") as file:
        file.truncate(100 * 2**30)
    with pytest.raises(ImageError, match=f"more than {MAX_FILE_BYTES:,}"):
        read_file(path)


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    data = encoded(".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    assert 1 < data.count(b"\xff\xda") < MAX_SCANS
    decode(data)
    with pytest.raises(ImageError, match="more than 100 scans"):
        decode(data[:-2] + b"\xff\xda\0\x08\1\1\0\0\x3f\0" * MAX_SCANS + data[-2:])


def test_a_tiff_directory_of_very_many_entries_is_refused() -> None:
    entries = 200_000
    data = b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, entries) + bytes(entries * 20 + 8)
    with pytest.raises(ImageError, match="200,000 entries"):
        decode(data)


def test_a_tiff_directory_that_repeats_a_long_list_reads_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    entries, count, read = 900, 100_000, 0
    entry = struct.pack("<HHQQ", 273, 16, count, 0)
    data = b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, entries) + entry * entries
    data += bytes(8 * count)

    def unpack_from(*arguments: Any) -> tuple[Any, ...]:
        nonlocal read
        values = struct.unpack_from(*arguments)
        read += len(values)
        return values

    counted = SimpleNamespace(unpack_from=unpack_from, calcsize=struct.calcsize, error=struct.error)
    monkeypatch.setattr(headers, "struct", counted)
    with pytest.raises(ImageError, match="does not state its size"):
        headers.stated_size(data)
    assert count < read < 2 * count
