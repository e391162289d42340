"""How often damage inside the data of each format is not detected; and files that would exhaust memory or time.

PNG and TIFF in deflate have checksums, which are compared, and most damage to TIFF in LZW fails to decode. The other
formats have nothing that shows all damage.
"""

from __future__ import annotations

import random
import re
import struct
import zlib
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from support.paths import ROOT
from support.pictures import opencv

from cloudrt.data.scenes import draw_scene
from cloudrt.errors import ImageError
from cloudrt.images import headers
from cloudrt.images.image import MAX_FILE_BYTES, MAX_SCANS, decode, is_plain_jpeg, read_file
from cloudrt.images.tiff import MAX_VALUES

PLACES = 200


def picture() -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (233, 350, 3), np.uint8)
    smooth = cv2.GaussianBlur(noise, (0, 0), 4)
    return np.asarray(cv2.normalize(smooth, smooth, 0, 255, cv2.NORM_MINMAX), np.uint8)


def encoded(suffix: str, *options: int) -> bytes:
    return opencv(suffix, picture(), *options)


def of_pillow(mode: str, kind: str, **options: object) -> bytes:
    content = BytesIO()
    Image.fromarray(picture()).convert(mode).save(content, kind, **options)
    return content.getvalue()


def deep(kind: str, **options: object) -> bytes:
    """One channel of 16 bits."""
    content = BytesIO()
    Image.fromarray(picture()[..., 0].astype(np.uint16) * 257).save(content, kind, **options)
    return content.getvalue()


def stated_shares() -> dict[str, float]:
    """Return format -> share from the table in docs/explanation/decoding.md."""
    text = (ROOT / "docs" / "explanation" / "decoding.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| (\d+)% \|$", text, re.MULTILINE)
    return {name: int(share) / 100 for names, share in rows for name in names.split("; ")}


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


DAMAGED = [
    (encoded(".png"), "PNG", 0),
    (encoded(".jpg", cv2.IMWRITE_JPEG_QUALITY, 90), "JPEG", 0.1),
    (encoded(".tif", cv2.IMWRITE_TIFF_COMPRESSION, 5), "TIFF, LZW", 0.02),
    (encoded(".tif", cv2.IMWRITE_TIFF_COMPRESSION, 8), "TIFF, deflate", 0),
    (opencv(".tif", draw_scene(0, (467, 700)).image, cv2.IMWRITE_TIFF_COMPRESSION, 8), "TIFF, deflate", 0),
    (encoded(".tif", cv2.IMWRITE_TIFF_COMPRESSION, 32773), "TIFF, PackBits", 0.1),
    (encoded(".tif", cv2.IMWRITE_TIFF_COMPRESSION, 1), "TIFF, uncompressed", 0.1),
    (of_pillow("RGB", "TIFF", compression="jpeg"), "TIFF, JPEG", 0.1),
    (of_pillow("1", "TIFF", compression="group3"), "TIFF, CCITT", 0.1),
    (of_pillow("1", "TIFF", compression="group4"), "TIFF, CCITT", 0.1),
    (deep("TIFF", compression="tiff_lzw"), "TIFF, LZW", 0.02),
    (deep("TIFF", compression="tiff_adobe_deflate"), "TIFF, deflate", 0),
    (of_pillow("P", "TIFF", compression="tiff_adobe_deflate"), "TIFF with a palette, deflate", 0.02),
    (of_pillow("P", "TIFF", compression="tiff_lzw"), "TIFF with a palette, LZW", 0.02),
    (of_pillow("P", "PNG"), "PNG", 0),
    (deep("PNG"), "PNG", 0),
    (of_pillow("P", "BMP"), "BMP", 0.1),
    (encoded(".jpg", cv2.IMWRITE_JPEG_QUALITY, 90, cv2.IMWRITE_JPEG_PROGRESSIVE, 1), "JPEG, progressive", 0.1),
    (of_pillow("L", "JPEG", quality=90), "JPEG, grayscale", 0.05),
    (of_pillow("CMYK", "JPEG", quality=90), "JPEG, CMYK", 0.05),
    (of_pillow("RGBA", "WEBP", lossless=True), "WebP, lossless", 0.1),
    (encoded(".webp", cv2.IMWRITE_WEBP_QUALITY, 90), "WebP, lossy", 0.1),
    (encoded(".webp", cv2.IMWRITE_WEBP_QUALITY, 101), "WebP, lossless", 0.1),
    (encoded(".bmp"), "BMP", 0.1),
]
"""Data, format in the documentation, and tolerance of the share."""


@pytest.mark.parametrize(("data", "name", "tolerance"), DAMAGED, ids=[name for _, name, _ in DAMAGED])
def test_the_shares_are_those_of_the_documentation(
    data: bytes, name: str, tolerance: float, capfd: pytest.CaptureFixture[str]
) -> None:
    share = silent(data)
    capfd.readouterr()  # the warnings of the decoders
    assert share == pytest.approx(stated_shares()[name], abs=tolerance)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_a_sound_tiff_in_deflate_is_read_in_each_mode(mode: str) -> None:
    """Rows of single bits are padded to bytes."""
    content = BytesIO()
    image = Image.fromarray(picture()).convert(mode)
    image.save(content, "TIFF", compression="tiff_adobe_deflate")
    assert np.array_equal(decode(content.getvalue()), np.asarray(image.convert("RGB")))


def test_files_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.jpg"
    with path.open("wb") as file:
        file.truncate(100 * 2**30)
    with pytest.raises(ImageError, match=f"more than {MAX_FILE_BYTES:,}"):
        read_file(path)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="/proc")
def test_files_that_state_no_size_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to("/proc/self/status")  # others, such as /proc/kmsg, block when they are read
    assert read_file(tmp_path / "a.jpg") == b""


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    data = encoded(".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    assert 1 < data.count(b"\xff\xda") < MAX_SCANS
    decode(data)
    many = data[:-2] + b"\xff\xda\0\x08\1\1\0\0\x3f\0" * MAX_SCANS + data[-2:]
    with pytest.raises(ImageError, match="more than 100 scans"):
        decode(many)
    with pytest.raises(ImageError, match="more than 100 scans"):
        is_plain_jpeg(many)  # selects the files that `decoder="gpu"` decodes on the GPU


def test_a_tiff_directory_of_very_many_entries_is_refused() -> None:
    entries = 200_000
    data = b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, entries) + bytes(entries * 20 + 8)
    with pytest.raises(ImageError, match="200,000 entries"):
        decode(data)


def tiff(*entries: bytes, size: int) -> bytes:
    """A BigTIFF of 64x64 pixels with further entries, and zeros after its directory."""
    usual = [struct.pack("<HHQQ", tag, 4, 1, value) for tag, value in ((256, 64), (257, 64), (273, 512), (279, 4096))]
    return b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 4 + len(entries)) + b"".join((*usual, *entries)) + bytes(size)


@pytest.mark.parametrize("tag", [258, 273, 324, 40_000])
def test_a_tiff_entry_of_very_many_numbers_is_refused(tag: int) -> None:
    assert headers.stated_size(tiff(size=8192)) == (64, 64)
    count = MAX_VALUES + 1
    with pytest.raises(ImageError, match="1,000,001 numbers"):
        headers.stated_size(tiff(struct.pack("<HHQQ", tag, 3, count, 512), size=2 * count + 1024))


def test_tiff_entries_that_share_their_values_are_refused() -> None:
    size = 100_000
    shared = [struct.pack("<HHQQ", 40_000 + number, 7, size, 512) for number in range(2)]
    assert headers.stated_size(tiff(shared[0], size=size + 512)) == (64, 64)
    with pytest.raises(ImageError, match="larger than the file"):
        headers.stated_size(tiff(*shared, size=size + 512))


@pytest.mark.parametrize("segment", [b"\xff\xe0\x00\x02", b"\xff"], ids=["empty", "fill"])
def test_a_jpeg_of_very_many_segments_is_refused(segment: bytes) -> None:
    data = encoded(".jpg")
    decode(data[:2] + segment * (headers.MAX_SEGMENTS // 2) + data[2:])
    with pytest.raises(ImageError, match="more than 10,000 segments"):
        decode(data[:2] + segment * headers.MAX_SEGMENTS + data[2:])


@pytest.mark.parametrize("name", [b"teSt", b"IDAT"])
def test_a_png_of_very_many_chunks_is_refused(name: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "MAX_CHUNKS", 100)
    data = encoded(".png")
    chunk = struct.pack(">I4sI", 0, name, zlib.crc32(name))
    decode(data[:33] + chunk * 50 + data[33:])
    with pytest.raises(ImageError, match="more than 100 chunks"):
        decode(data[:33] + chunk * 100 + data[33:])


def test_a_tiff_with_an_impossible_palette_is_refused() -> None:
    palette = BytesIO()
    Image.fromarray(picture()).convert("P").save(palette, "TIFF")
    data = bytearray(palette.getvalue())
    decode(bytes(data))
    at = struct.unpack_from("<I", data, 4)[0] + 2
    while struct.unpack_from("<H", data, at)[0] != 320:
        at += 12
    struct.pack_into("<H", data, at + 2, 6)  # signed bytes, which Pillow does not expect
    struct.pack_into("<768b", data, struct.unpack_from("<I", data, at + 8)[0], *[-1] * 768)
    with pytest.raises(ImageError, match="damaged TIFF"):
        decode(bytes(data))


def test_an_animated_png_without_its_last_rows_is_refused() -> None:
    """OpenCV would leave the rows as they were in memory."""
    content = BytesIO()
    grey = Image.new("RGB", (350, 233), (70, 70, 70))
    grey.save(content, "PNG", save_all=True, append_images=[Image.new("RGB", (350, 233))])
    data, at = content.getvalue(), content.getvalue().index(b"IDAT")
    end = at + 4 + int.from_bytes(data[at - 4 : at], "big")
    rows = b"IDAT" + zlib.compress(zlib.decompress(data[at + 4 : end])[: 200 * (1 + 3 * 350)])
    short = struct.pack(">I", len(rows) - 4) + rows + struct.pack(">I", zlib.crc32(rows))
    assert np.array_equal(decode(data), np.asarray(grey))
    with pytest.raises(ImageError, match="is damaged"):
        decode(data[: at - 4] + short + data[end + 4 :])


def raw_tiff(order: str, *strips: bytes, **changed: int) -> bytes:
    """A BigTIFF of `picture()`: byte order "<" or ">", these strips, and some tags changed, such as t259=8."""
    places = [16 + sum(map(len, strips[:number])) for number in range(len(strips))]
    tags: dict[int, list[int]] = {256: [350], 257: [233], 258: [8] * 3, 259: [1], 262: [2], 273: places, 277: [3]}
    tags |= {278: [-(-233 // len(strips))], 279: [*map(len, strips)]}
    tags |= {int(name[1:]): [value] for name, value in changed.items()}
    body = b"".join(strips)
    entries, far, home = b"", b"", 16 + len(body) + 8 + 20 * len(tags) + 8
    for tag, values in tags.items():
        packed = struct.pack(f"{order}{len(values)}I", *values)
        entries += struct.pack(order + "HHQ", tag, 4, len(values))
        entries += packed.ljust(8, b"\0") if len(packed) <= 8 else struct.pack(order + "Q", home + len(far))
        far += packed if len(packed) > 8 else b""
    start = struct.pack(order + "2sHHHQ", {"<": b"II", ">": b"MM"}[order], 43, 8, 0, 16 + len(body))
    return start + body + struct.pack(order + "Q", len(tags)) + entries + bytes(8) + far


HALVES = (picture()[:117].tobytes(), picture()[117:].tobytes())


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_in_a_compression_that_opencv_would_read_as_black_is_refused(order: str) -> None:
    assert np.array_equal(decode(raw_tiff(order, *HALVES)), picture())
    with pytest.raises(ImageError, match="compressed TIFF of a kind that cannot be checked"):
        decode(raw_tiff(order, *HALVES, t259=34712))  # JPEG 2000


@pytest.mark.parametrize("order", ["<", ">"])  # Pillow does not open big-endian BigTIFF
def test_damaged_strips_are_refused_in_each_byte_order(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # larger images are checked too
    with pytest.raises(ImageError, match=r"damaged TIFF|cannot be checked"):
        decode(raw_tiff(order, zlib.compress(HALVES[0]), b"no deflate stream", t259=8))


@pytest.mark.parametrize(
    ("strip", "reason"),
    [
        (zlib.compress(HALVES[1])[:-9], "has no end"),
        (zlib.compress(HALVES[1] + bytes(10**4)), "larger than its pixels"),
    ],
)
def test_the_damage_of_a_deflate_strip_is_named(strip: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode(raw_tiff("<", zlib.compress(HALVES[0]), strip, t259=8))


@pytest.mark.parametrize(
    "changed",
    [{"t278": 20}, {"t284": 2}, {"t322": 32, "t323": 32, "t324": 16, "t325": 3072}],
    ids=["rows", "planes", "tiles"],
)
def test_a_tiff_with_fewer_strips_than_its_size_needs_is_refused(changed: dict[str, int]) -> None:
    with pytest.raises(ImageError, match="strips or tiles"):
        decode(raw_tiff("<", *HALVES, **changed))
