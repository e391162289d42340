"""Decoding: valid files equal cv2.imread in colour; others are refused with a reason, never repaired."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support.pictures import FILES, HEIGHT, JPEGS, OTHERS, WIDTH, chunk, imread, picture, png, refusal

from cloudrt.errors import DataError, ImageError
from cloudrt.images.headers import stated_size
from cloudrt.images.image import decode, find_images, load_image


@pytest.mark.parametrize("name", FILES)
def test_sound_files_are_what_opencv_reads(tmp_path: Path, name: str) -> None:
    data = FILES[name]()
    (tmp_path / "image").write_bytes(data)
    expected = imread(tmp_path / "image")[:, :, ::-1]
    found = decode(data)
    assert found.dtype == np.uint8 and found.shape == expected.shape
    assert expected.shape == ((WIDTH, HEIGHT, 3) if expected.shape[0] == WIDTH else (HEIGHT, WIDTH, 3))
    assert np.array_equal(found, expected)
    loaded = load_image(tmp_path / "image", expected.shape[:2])
    assert np.array_equal(loaded, expected) and loaded.flags.c_contiguous
    assert load_image(str(tmp_path / "image"), (30, 40)).shape == load_image(data, (30, 40)).shape == (30, 40, 3)


def test_a_turned_image_is_turned() -> None:
    assert decode(JPEGS["EXIF, turned right"]()).shape == (WIDTH, HEIGHT, 3)
    assert decode(JPEGS["EXIF after long comments"]()).shape == (WIDTH, HEIGHT, 3)
    assert load_image(JPEGS["EXIF, turned right"](), (40, 20)).shape == (40, 20, 3)


CUTTABLE = [name for name in FILES if "trailing data" not in name]


@pytest.mark.parametrize("name", CUTTABLE)
def test_cut_files_are_refused_wherever_they_are_cut(name: str) -> None:
    """Within the header, in each region of the file, and one or two bytes before the end."""
    data = FILES[name]()
    parts = {len(data) * part // 23 for part in range(1, 23)}
    for cut in sorted({1, 2, 3, 4, 8, 12, 20, 26, 30, 50, len(data) - 2, len(data) - 1} | parts):
        with pytest.raises(ImageError):
            decode(data[:cut])
        with pytest.raises(ImageError):
            decode(data[:cut], (10, 10))


@pytest.mark.parametrize("name", [name for name in CUTTABLE if name in OTHERS])
def test_cut_files_are_detected_before_opencv_runs(name: str) -> None:
    """Some versions of OpenCV fill in the missing part, and all of them print to stderr."""
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
    """Zeros are valid codes, and JPEG has no checksums: damage is detected only if the remaining length is wrong."""
    done, jpeg = cv2.imencode(".jpg", picture(350, 525, sigma=1))
    assert done
    data = bytearray(jpeg.tobytes())
    data[len(data) // 2 : len(data) // 2 + 4096] = bytes(4096)
    assert "Corrupt JPEG data" in refusal(bytes(data))


def test_any_damage_to_a_png_is_detected_before_opencv_runs() -> None:
    data = FILES["PNG"]()
    for at in range(8, len(data), 97):
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        with pytest.raises(ImageError, match=r"has a wrong checksum|is truncated"):
            stated_size(bytes(damaged))
        assert refusal(bytes(damaged))


def test_a_png_that_ends_early_without_being_cut_is_refused() -> None:
    """Its chunks are valid and end with IEND, but contain half of the rows."""
    assert "damaged" in refusal(png(100, 100, bytes(301 * 50)))
    assert "truncated" in refusal(png(100, 100, bytes(301 * 100))[:-12])
    assert decode(png(100, 100, bytes(301 * 100))).shape == (100, 100, 3)


@pytest.mark.parametrize("kind", [b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"pHYs", b"zTXt", b"tIME", b"vpAg"])
def test_metadata_chunks_of_a_png_change_nothing_and_print_nothing(
    kind: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    """Chunks with wrong content, for which libpng would print a warning to stderr."""
    data = FILES["PNG"]()
    note = chunk(kind, b"\x09bad\0")
    assert np.array_equal(decode(data[:33] + note + data[33:-12] + note + data[-12:] + b"trailer"), decode(data))
    assert capfd.readouterr() == ("", "")


def test_chunks_of_a_png_that_change_pixels_are_kept(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20)).convert("P")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned right
    image.save(tmp_path / "a.png", transparency=3, exif=exif, dpi=(72, 72))
    found = decode((tmp_path / "a.png").read_bytes())
    assert found.shape == (20, 10, 3)
    assert np.array_equal(found, imread(tmp_path / "a.png")[:, :, ::-1])


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
    assert "an image array must be (H, W, 3) uint8 RGB, found" in refusal(array)


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
    (tmp_path / "round").symlink_to(tmp_path)  # a link to the folder itself
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
