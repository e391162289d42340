"""Files to pixels: what is sound equals cv2.imread in colour; what is not is refused by name, never guessed."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from cloudrt.errors import DataError, ImageError
from cloudrt.headers import stated_size
from cloudrt.images import decode, find_images, load_image, resize

pillow = pytest.importorskip("PIL.Image")

HEIGHT, WIDTH = 90, 133


def picture(height: int = HEIGHT, width: int = WIDTH, channels: int = 3, sigma: float = 3) -> NDArray[np.uint8]:
    """A smooth (H, W, channels) uint8 picture that fills the range."""
    noise = cv2.GaussianBlur(np.random.default_rng(0).random((height, width, channels)), (0, 0), sigma)
    return np.asarray(cv2.normalize(noise, None, 0, 255, cv2.NORM_MINMAX), np.uint8).reshape(height, width, channels)


def encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    """The bytes of a picture as Pillow writes them."""
    channels = {"L": 1, "LA": 2, "RGBA": 4, "CMYK": 4}.get(mode, 3)
    pixels = picture(channels=channels)
    if mode == "P":
        image = pillow.fromarray(pixels).quantize(50)
    elif mode == "1":
        image = pillow.fromarray(pixels).convert("1")
    elif mode == "I;16":
        image = pillow.fromarray(pixels[:, :, 0].astype(np.uint16) * 257 + 3)
    else:
        image = pillow.frombytes(mode, (WIDTH, HEIGHT), pixels.tobytes())
    if orientation := options.pop("orientation", None):
        options["exif"] = image.getexif()
        options["exif"][0x0112] = orientation
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opencv(kind: str, pixels: NDArray[Any], *options: int) -> bytes:
    """The bytes of a picture as OpenCV writes them."""
    done, data = cv2.imencode(kind, pixels, options)
    assert done
    return bytes(data.tobytes())


def sixteen_bits(channels: int) -> NDArray[np.uint16]:
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
    "EXIF after much else": lambda: behind_segments(encoded("JPEG", orientation=6)),
    "something behind": lambda: encoded("JPEG") + b"a trailer that some cameras write",
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
    "PNG, something behind": lambda: encoded("PNG") + b"trailer",
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
    "TIFF, rows a strip": lambda: opencv(".tiff", picture(), cv2.IMWRITE_TIFF_ROWSPERSTRIP, 7),
    "BMP": lambda: encoded("BMP"),
    "BMP, grey": lambda: encoded("BMP", "L"),
    "BMP, OpenCV": lambda: opencv(".bmp", picture()),
}
FILES = JPEGS | OTHERS


def behind_segments(jpeg: bytes) -> bytes:
    """Put two comments of 60,000 bytes before what follows the first segment."""
    first = 4 + int.from_bytes(jpeg[4:6], "big")
    comment = b"\xff\xfe" + struct.pack(">H", 60_002) + bytes(60_000)
    return jpeg[:first] + 2 * comment + jpeg[first:]


def imread(path: Path, data: bytes) -> NDArray[np.uint8]:
    path.write_bytes(data)
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    assert image is not None
    return np.asarray(image[:, :, ::-1], np.uint8)


@pytest.mark.parametrize("name", FILES)
def test_sound_files_are_what_opencv_reads(tmp_path: Path, name: str) -> None:
    data = FILES[name]()
    expected = imread(tmp_path / "image", data)
    found = decode(data)
    assert found.dtype == np.uint8 and found.shape == expected.shape
    assert expected.shape == ((WIDTH, HEIGHT, 3) if expected.shape[0] == WIDTH else (HEIGHT, WIDTH, 3))
    assert np.array_equal(found, expected)
    loaded = load_image(tmp_path / "image", expected.shape[:2])
    assert np.array_equal(loaded, expected) and loaded.flags.c_contiguous
    assert load_image(str(tmp_path / "image"), (30, 40)).shape == load_image(data, (30, 40)).shape == (30, 40, 3)


def test_a_turned_image_is_turned() -> None:
    assert decode(JPEGS["EXIF, turned right"]()).shape == (WIDTH, HEIGHT, 3)
    assert decode(JPEGS["EXIF after much else"]()).shape == (WIDTH, HEIGHT, 3)
    assert load_image(JPEGS["EXIF, turned right"](), (40, 20)).shape == (40, 20, 3)


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source, (30, 40), **options)
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1
    return message


CUTTABLE = [name for name in FILES if "something behind" not in name]


@pytest.mark.parametrize("name", CUTTABLE)
def test_cut_files_are_refused_wherever_they_are_cut(name: str) -> None:
    """At a byte from the end, at two, in each region of the file, and within the header."""
    data = FILES[name]()
    parts = {len(data) * part // 23 for part in range(1, 23)}
    for cut in sorted({1, 2, 3, 4, 8, 12, 20, 26, 30, 50, len(data) - 2, len(data) - 1} | parts):
        with pytest.raises(ImageError):
            decode(data[:cut])
        with pytest.raises(ImageError):
            decode(data[:cut], (10, 10))


@pytest.mark.parametrize("name", [name for name in OTHERS if "something behind" not in name])
def test_cut_files_are_noticed_before_opencv_is_asked(name: str) -> None:
    """Some of its versions paint what is missing, and all complain on stderr."""
    data = OTHERS[name]()
    assert sorted(stated_size(data)) == [HEIGHT, WIDTH]
    for cut in (len(data) // 2, len(data) * 9 // 10, len(data) - 1):
        with pytest.raises(ImageError, match="is truncated"):
            stated_size(data[:cut])


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("fill", ["ones", "noise"])
def test_a_jpeg_with_a_hole_in_the_middle_is_refused(name: str, fill: str) -> None:
    data = bytearray(JPEGS[name]())
    middle = (data.index(b"\xff\xda") + len(data)) // 2
    length = len(data[middle : middle + 400])
    data[middle : middle + 400] = b"\xff" * length if fill == "ones" else np.random.default_rng(1).bytes(length)
    for cover in (None, (10, 10)):
        with pytest.raises(ImageError):
            decode(bytes(data), cover)


def test_a_hole_of_zeros_is_refused_where_the_decoder_can_tell() -> None:
    """Zeros are codes too, and JPEG has no checksums: what remains must still be of the wrong length to be noticed."""
    done, jpeg = cv2.imencode(".jpg", picture(350, 525, sigma=1))
    assert done
    data = bytearray(jpeg.tobytes())
    data[len(data) // 2 : len(data) // 2 + 4096] = bytes(4096)
    assert "Corrupt JPEG data" in refusal(bytes(data))


def test_any_damage_to_a_png_is_noticed_before_opencv_is_asked() -> None:
    data = FILES["PNG"]()
    for at in range(8, len(data), 97):
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        with pytest.raises(ImageError, match=r"has a wrong checksum|is truncated"):
            stated_size(bytes(damaged))
        assert refusal(bytes(damaged))


def test_a_png_that_ends_early_without_being_cut_is_refused() -> None:
    """Sound chunks, an IEND, and half the rows."""
    assert "damaged" in refusal(png(100, 100, bytes(301 * 50)))
    assert "truncated" in refusal(png(100, 100, bytes(301 * 100))[:-12])
    assert decode(png(100, 100, bytes(301 * 100))).shape == (100, 100, 3)


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


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(height: int, width: int, rows: bytes = b"") -> bytes:
    """An 8-bit RGB PNG that states a size, whatever its rows."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def jpeg(height: int, width: int) -> bytes:
    """A small JPEG whose frame header is made to state a size."""
    data = bytearray(encoded("JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


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
    """Run-length coded, so that nothing says how long the file should be."""
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
    """In a process that cannot have the 10 GB that 60,000 x 60,000 pixels take, nor a twentieth of it."""
    for name, data in BOMBS.items():
        (tmp_path / name.replace(", ", "-")).write_bytes(data)
    script = textwrap.dedent("""
        import resource, sys
        from pathlib import Path
        from cloudrt.errors import ImageError
        from cloudrt.images import load_image
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
    assert done.stderr == ""  # OpenCV, which would complain aloud, was not asked
    assert int(done.stdout) * 1024 < 16 * 2**20


def test_the_limit_is_inclusive_and_can_be_set() -> None:
    for data in (FILES["PNG"](), FILES["4:2:0"](), FILES["EXIF, turned right"]()):
        assert load_image(data, (30, 40), max_pixels=HEIGHT * WIDTH).shape == (30, 40, 3)
        assert "is oversized" in refusal(data, max_pixels=HEIGHT * WIDTH - 1)


@pytest.mark.parametrize("data", [png(0, 10), png(10, 0), bmp(10, 0), bmp(10, -5), tiff(0, 10), jpeg(10, 0)])
def test_images_without_pixels(data: bytes) -> None:
    assert refusal(data)


def test_unreadable_paths(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("hello")
    assert refusal(tmp_path / "folder.jpg") == "cannot be read: Is a directory"
    assert refusal(tmp_path / "dangling.jpg") == "cannot be read: No such file or directory"
    assert "cannot be read" in refusal(tmp_path / "loop.jpg")
    assert refusal(tmp_path / "missing.jpg") == "cannot be read: No such file or directory"
    assert refusal(tmp_path / ("x" * 300)) == "cannot be read: File name too long"
    assert "cannot be read" in refusal("nul\0byte.jpg")
    assert refusal(tmp_path / "empty.jpg") == "is empty"
    assert "is not a JPEG" in refusal(tmp_path / "text.jpg")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 1), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.int8),
        np.zeros((4, 4, 3), bool),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
    ],
    ids=lambda array: f"{array.shape} {array.dtype}",
)
def test_arrays_of_another_form_are_refused(array: NDArray[Any]) -> None:
    assert "an image array is (H, W, 3) uint8 RGB, found" in refusal(array)


def test_arrays_in_any_layout_give_the_same() -> None:
    pixels = picture()
    expected = load_image(pixels, (30, 40))
    wide = np.zeros((2 * HEIGHT, WIDTH, 6), np.uint8)
    wide[::2, :, ::2] = pixels
    for same in (
        np.asfortranarray(pixels),
        wide[::2, :, ::2],
        np.ascontiguousarray(pixels[:, :, ::-1])[:, :, ::-1],
        np.ascontiguousarray(pixels[::-1])[::-1],
        np.ascontiguousarray(pixels.transpose(2, 0, 1)).transpose(1, 2, 0),
    ):
        assert np.array_equal(load_image(same, (30, 40)), expected)
        unchanged = load_image(same, (HEIGHT, WIDTH))
        assert np.array_equal(unchanged, pixels) and unchanged.flags.c_contiguous


@pytest.mark.parametrize("size", [(1, 1), (30, 40), (90, 133), (45, 300), (200, 20), (300, 500), (1, 700), (89, 133)])
def test_every_size_is_reached(size: tuple[int, int]) -> None:
    for source in (picture(), FILES["4:2:0"](), FILES["PNG"](), FILES["EXIF, turned right"]()):
        image = load_image(source, size)
        assert image.shape == (*size, 3) and image.dtype == np.uint8 and image.flags.c_contiguous


def test_what_shrinks_is_averaged() -> None:
    """By whole factors area averaging is the mean of each block."""
    pixels = picture(sigma=0.5)[:90, :132]
    means = pixels.reshape(30, 3, 33, 4, 3).mean(axis=(1, 3))
    assert np.abs(resize(pixels, (30, 33)).astype(float) - means).max() <= 0.5


@pytest.mark.parametrize("size", [(10, 264), (180, 12)])
def test_a_side_that_shrinks_is_averaged_though_the_other_grows(size: tuple[int, int]) -> None:
    """Stripes a pixel wide turn grey, instead of black or white by chance."""
    stripes = np.zeros((90, 132, 3), np.uint8)
    if size[0] < 90:
        stripes[::2] = 255
    else:
        stripes[:, ::2] = 255
    resized = resize(stripes, size)
    assert resized.shape == (*size, 3)
    assert np.abs(resized.astype(int) - 127).max() <= 16


def test_what_grows_is_interpolated_between_half_pixel_centres() -> None:
    ramp = np.repeat(np.array([[[0], [100]]], np.uint8), 3, axis=2)
    assert resize(ramp, (1, 4))[0, :, 0].tolist() == [0, 25, 75, 100]


@pytest.mark.parametrize("cover", [(88, 132), (100, 133), (176, 264), (300, 400), (352, 528), (353, 529), (704, 1056)])
def test_a_scaled_decode_is_nearly_the_whole_one(cover: tuple[int, int]) -> None:
    """It covers the wanted size, and after the resize differs by little on average."""
    scaled, whole = decode_both(picture(704, 1056, sigma=9), cover)
    difference = np.abs(scaled.astype(int) - whole.astype(int))
    assert difference.mean() < 0.6 and difference.max() <= 12


@pytest.mark.parametrize("cover", [(88, 132), (320, 640), (351, 526), (401, 30)])
@pytest.mark.parametrize("size", [(700, 1050), (701, 1049), (699, 1051)])
def test_scales_that_do_not_divide_shift_by_less_than_a_pixel(size: tuple[int, int], cover: tuple[int, int]) -> None:
    """libjpeg rounds the scaled size up, so that its last row and column reach beyond the image."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    ramps = np.stack([rows * 255 / size[0], columns * 255 / size[1], rows * 0], axis=2).astype(np.uint8)
    scaled, whole = decode_both(ramps, cover)
    pixel = 255 / min(cover)
    assert np.abs(scaled.astype(int) - whole.astype(int)).max() <= pixel + 3


def decode_both(pixels: NDArray[np.uint8], cover: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Write a JPEG; decode it scaled and whole, and bring both to `cover`."""
    file = io.BytesIO()
    pillow.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=0)
    scaled, whole = decode(file.getvalue(), cover), decode(file.getvalue())
    assert whole.shape == pixels.shape
    assert all(side >= wanted for side, wanted in zip(scaled.shape[:2], cover, strict=True))
    if 2 * cover[0] <= pixels.shape[0] and 2 * cover[1] <= pixels.shape[1]:
        assert scaled.size <= whole.size / 2
    return resize(scaled, cover), resize(whole, cover)


def test_a_size_beyond_the_image_decodes_the_whole() -> None:
    data = FILES["4:2:0"]()
    assert np.array_equal(decode(data, (500, 700)), decode(data))


def test_images_are_found_in_the_order_of_their_keys(tmp_path: Path) -> None:
    names = [
        "b.jpg",
        "a.JPG",
        "ä ö.png",
        "雲.jpeg",
        "sub/a.tif",
        "sub/deep er/z.webp",
        "sub.jpg/inside.bmp",
        "a,b.TIFF",
    ]
    for name in [*names, ".hidden.jpg", ".hidden/a.jpg", "._b.jpg", "notes.txt", "jpg", "a.jpg.txt", "sub/.x/y.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "round").symlink_to(tmp_path)  # a folder that holds itself
    found = find_images(tmp_path)
    assert [file.key for file in found] == sorted([*names, "dangling.jpg"])
    assert all(file.path == tmp_path / file.key for file in found)
    assert find_images(str(tmp_path)) == found


def test_one_file_is_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    (file,) = find_images(tmp_path / "a.jpg")
    assert (file.key, file.path) == ("a.jpg", tmp_path / "a.jpg")


def test_a_name_that_is_not_utf8_has_a_key_that_can_be_written(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    try:
        with open(name, "wb") as file:  # noqa: PTH123 - bytes
            file.write(FILES["4:2:0"]())
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    (found,) = find_images(tmp_path)
    assert found.key == "caf\\xe9.jpg" and found.key.encode("utf-8")
    assert load_image(found.path, (30, 40)).shape == (30, 40, 3)


def test_no_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no images \(\.bmp, \.jpeg"):
        find_images(tmp_path)
    (tmp_path / "notes.txt").touch()
    for path in (tmp_path / "none", tmp_path / "none.jpg", tmp_path / "notes.txt"):
        with pytest.raises(DataError, match="neither a folder of images nor an image"):
            find_images(path)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "a.jpg").touch()
    (tmp_path / "shut").mkdir()
    scandir = os.scandir

    def guarded(path: str) -> Any:
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(DataError, match="shut cannot be listed: Permission denied"):
        find_images(tmp_path)
