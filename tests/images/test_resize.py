"""Images at the input size: scaled decoding, shrinking and enlarging."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support.pictures import FILES, picture

from cloudrt.images.image import decode, load_image
from cloudrt.images.resize import reduce, resize


@pytest.mark.parametrize("size", [(1, 1), (30, 40), (90, 133), (45, 300), (200, 20), (300, 500), (1, 700), (89, 133)])
def test_every_size_is_reached(size: tuple[int, int]) -> None:
    for source in (picture(), FILES["4:2:0"](), FILES["PNG"](), FILES["EXIF, turned right"]()):
        image = load_image(source, size)
        assert image.shape == (*size, 3) and image.dtype == np.uint8 and image.flags.c_contiguous


def test_what_shrinks_is_averaged() -> None:
    """With integer factors, area averaging is the mean of each block."""
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


def decode_both(pixels: NDArray[np.uint8], cover: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Write a JPEG; decode it scaled and whole, and bring both to `cover`."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=0)
    scaled, whole = decode(file.getvalue(), cover), decode(file.getvalue())
    assert whole.shape == pixels.shape
    assert all(side >= wanted for side, wanted in zip(scaled.shape[:2], cover, strict=True))
    if 2 * cover[0] <= pixels.shape[0] and 2 * cover[1] <= pixels.shape[1]:
        assert scaled.size <= whole.size / 2
    return resize(scaled, cover), resize(whole, cover)


@pytest.mark.parametrize("cover", [(88, 132), (100, 133), (176, 264), (300, 400), (352, 528), (353, 529), (704, 1056)])
def test_a_scaled_decode_is_nearly_the_whole_one(cover: tuple[int, int]) -> None:
    """It is at least as large as the wanted size; resized to that size, the two differ by little on average."""
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


@pytest.mark.parametrize("eighths", range(1, 8))
@pytest.mark.parametrize("size", [(400, 608), (397, 603)])
def test_arrays_and_other_files_are_reduced_like_a_jpeg(size: tuple[int, int], eighths: int) -> None:
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (40, 60, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(smooth).resize(size[::-1], 2)) // 2 + 60
    pixels[100:140, 200:260] = 230  # three of its edges lie inside blocks of 8x8 pixels
    jpeg, png = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(jpeg, "JPEG", quality=98, subsampling=0)
    decoded = decode(jpeg.getvalue())
    Image.fromarray(decoded).save(png, "PNG")
    cover = size[0] * eighths // 8, size[1] * eighths // 8
    expected = decode(jpeg.getvalue(), cover)
    found = reduce(decoded, cover)
    assert found.shape == expected.shape == (-(-size[0] * eighths // 8), -(-size[1] * eighths // 8), 3)
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.mean() < 0.6 and difference.max() <= 4
    assert np.array_equal(decode(png.getvalue(), cover), found)
    smaller = cover[0] - 5, cover[1] - 8
    assert np.array_equal(load_image(decoded, smaller), load_image(png.getvalue(), smaller))
    assert np.abs(load_image(decoded, smaller).astype(int) - load_image(jpeg.getvalue(), smaller)).max() <= 4


@pytest.mark.parametrize("turned", [False, True])
def test_a_long_image_is_reduced_in_bands(turned: bool) -> None:
    """The bands of a long image equal its parts, reduced one by one; memory is less than three times the image's."""
    pixels = np.random.default_rng(0).integers(0, 256, (100, 60_400, 3), np.uint8)
    parts = [reduce(pixels[:, begin : begin + 400], (64, 96)) for begin in range(0, 60_400, 400)]
    expected = np.concatenate(parts, axis=1)
    if turned:
        pixels, expected = (np.ascontiguousarray(image.transpose(1, 0, 2)) for image in (pixels, expected))
    tracemalloc.start()
    found = reduce(pixels, (96, 64) if turned else (64, 96))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.shape == expected.shape and np.abs(found.astype(int) - expected).max() <= 1
    assert peak < 3 * pixels.nbytes


def test_small_images_are_not_reduced() -> None:
    pixels = picture()
    assert reduce(pixels, (pixels.shape[0], 10)) is pixels


def test_a_size_beyond_the_image_decodes_the_whole() -> None:
    data = FILES["4:2:0"]()
    assert np.array_equal(decode(data, (500, 700)), decode(data))
