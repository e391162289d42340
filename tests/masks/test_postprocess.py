"""Probability to text: equal to the notebook's, with the components of OpenCV, SciPy and cc3d."""

from __future__ import annotations

from typing import Any

import cc3d
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from pycocotools import mask as coco
from scipy import ndimage
from support import reference
from support.shapes import MASKS, checkerboard, comb, smooth_map, spiral

from cloudrt.errors import DataError
from cloudrt.masks.postprocess import postprocess
from cloudrt.masks.rle import rle_decode

AREAS = (0, 1, 2, 3, 10, 50, 10_000)


def layouts(array: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """The same values in every memory layout that users may pass."""
    height, width = array.shape
    wide = np.zeros((2 * height, 3 * width), array.dtype)
    wide[::2, ::3] = array
    backwards = np.ascontiguousarray(array[::-1, ::-1])
    read_only = array.copy()
    read_only.flags.writeable = False
    inside = np.zeros((height + 2, width + 2), array.dtype)
    inside[1:-1, 1:-1] = array
    return {
        "C": np.ascontiguousarray(array),
        "F": np.asfortranarray(array),
        "strided": wide[::2, ::3],
        "negative strides": backwards[::-1, ::-1],
        "read-only": read_only,
        "a window": inside[1:-1, 1:-1],
    }


@pytest.mark.parametrize("name", MASKS)
def test_hard_masks(name: str) -> None:
    mask = MASKS[name]
    for min_area in AREAS:
        expected = reference.postprocess(mask, 0, min_area)
        assert postprocess(mask, 0, min_area) == expected
        assert postprocess(mask.astype(np.float32), 0.5, min_area) == expected


@pytest.mark.parametrize("mask", [spiral(61), comb(40, 71, 3), checkerboard(35, 52)], ids=["spiral", "comb", "board"])
@pytest.mark.parametrize("turns", range(4))
def test_one_component_however_it_winds(mask: NDArray[np.uint8], turns: int) -> None:
    """The component is kept or removed as a whole: at its area, and one below."""
    turned = np.rot90(mask, turns)
    area = int(mask.sum())
    assert postprocess(turned, 0, area) == ""
    assert postprocess(turned, 0, area - 1) == reference.rle_encode(turned)


def test_diagonal_neighbours_are_one_component() -> None:
    for mask in (np.eye(2, dtype=np.uint8), np.eye(2, dtype=np.uint8)[::-1]):
        assert postprocess(mask, 0, 1) == reference.rle_encode(mask)
        assert postprocess(mask, 0, 2) == ""
    apart = np.array([[1, 0, 0], [0, 0, 0], [0, 0, 1]], np.uint8)
    assert postprocess(apart, 0, 1) == ""


def test_bottom_of_a_column_and_top_of_the_next_are_one_run_of_two_components() -> None:
    mask = MASKS["bottom then top"]
    assert postprocess(mask, 0, 0) == "14 2"
    assert postprocess(mask, 0, 1) == ""
    mask = mask.copy()
    mask[1, 2] = 1  # now the right one is larger
    assert postprocess(mask, 0, 1) == "15 2"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("layout", layouts(np.zeros((1, 1))))
def test_maps_in_every_layout(seed: int, layout: str) -> None:
    levels = smooth_map(np.random.default_rng(seed), 60 + seed, 90 - 7 * seed, 1 + seed)
    whole, parts = layouts(levels)[layout], layouts((levels / np.float32(255)).astype(np.float32))[layout]
    for threshold in (0, 60, 128, 200, 254, 255):
        for min_area in (0, 4, 100, 1000):
            assert postprocess(whole, threshold, min_area) == reference.postprocess(levels, threshold, min_area)
            fraction = threshold / 255
            assert postprocess(parts, fraction, min_area) == reference.postprocess(parts, fraction, min_area)


@pytest.mark.parametrize("sigma", [0.6, 6])
def test_the_submission_grid(sigma: float) -> None:
    levels = smooth_map(np.random.default_rng(5), 350, 525, sigma)
    for threshold, min_area in ((120, 0), (140, 30), (128, 9000)):
        assert postprocess(levels, threshold, min_area) == reference.postprocess(levels, threshold, min_area)


shapes = st.tuples(st.integers(1, 20), st.integers(1, 20))
noise = shapes.flatmap(lambda shape: arrays.arrays(np.uint8, shape, elements=st.integers(0, 4)))


@given(noise, st.integers(0, 4), st.integers(0, 30))
@settings(max_examples=200)
def test_any_map(levels: NDArray[np.uint8], threshold: int, min_area: int) -> None:
    expected = reference.postprocess(levels, threshold, min_area)
    assert postprocess(levels, threshold, min_area) == expected
    assert postprocess(np.asfortranarray(levels, np.float32), threshold, min_area) == expected


@given(noise)
@settings(max_examples=100)
def test_components_are_those_of_scipy_and_cc3d(levels: NDArray[np.uint8]) -> None:
    mask = (levels > 1).astype(np.uint8)  # cc3d 4.1.1 marks pixels that are off where the mask is bool
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    for min_area in sorted({0, *areas.tolist()}):
        found = rle_decode(postprocess(levels, 1, min_area), mask.shape)
        assert np.array_equal(found, areas[labels] > min_area)
        assert np.array_equal(found, cc3d.dust(mask, threshold=min_area + 1, connectivity=8))


SIDES = (1, 2, 63, 64, 65, 127, 128, 129, 200)


@pytest.mark.parametrize("height", SIDES)
@pytest.mark.parametrize("width", SIDES)
def test_sizes_around_multiples_of_64_bits(height: int, width: int) -> None:
    rng = np.random.default_rng(1000 * height + width)
    noise = rng.integers(0, 256, (height, width), dtype=np.uint8)
    for levels in (
        noise,
        smooth_map(rng, height, width, 2),
        np.full_like(noise, 255),
        checkerboard(height, width) * 255,
    ):
        for threshold, min_area in ((127, 0), (90, 4), (200, 1), (0, 30)):
            expected = reference.postprocess(levels, threshold, min_area)
            for form in (levels, np.asfortranarray(levels)):
                assert postprocess(form, threshold, min_area) == expected
                assert postprocess(form.astype(np.float32) / 255, (threshold + 0.5) / 255, min_area) == expected


def test_the_text_is_what_pycocotools_encodes() -> None:
    rng = np.random.default_rng(5)
    for sigma in (0.5, 2, 20):
        levels = smooth_map(rng, 350, 525, sigma)
        numbers = [int(token) for token in postprocess(levels, 127, 0).split()]
        counts, end = [], 1  # pycocotools counts pixels off, on, off, ...
        for start, length in zip(numbers[::2], numbers[1::2], strict=True):
            counts += [start - end, length]
            end = start + length
        counts += [levels.size + 1 - end] if end <= levels.size else []
        ours = coco.frPyObjects({"counts": counts, "size": list(levels.shape)}, *levels.shape)
        assert ours["counts"] == coco.encode(np.asfortranarray(levels > 127).astype(np.uint8))["counts"]


def test_a_result_does_not_depend_on_earlier_maps() -> None:
    rng = np.random.default_rng(1)
    kinds = {
        "dense": checkerboard(30, 40) * 255,
        "empty": np.zeros((30, 40), np.uint8),
        "smooth": smooth_map(rng, 30, 40),
        "full": np.full((30, 40), 255, np.uint8),
        "other size": checkerboard(3, 200) * 255,
        "other size, smooth": smooth_map(rng, 41, 30),
    }
    for _ in range(3):
        for name in rng.permutation(list(kinds)):
            for min_area in (0, 20):
                assert postprocess(kinds[name], 100, min_area) == reference.postprocess(kinds[name], 100, min_area), (
                    name
                )


@pytest.mark.parametrize(("height", "width"), [(20_000_001, 1), (1, 20_000_001), (5001, 4001)])
def test_numbers_of_eight_digits(height: int, width: int) -> None:
    mask = np.zeros((height, width), np.uint8)
    flat = mask.T.reshape(-1) if height == 1 or width == 1 else None
    if flat is None:
        mask[5000, 3000:] = 1
        mask[:, 4000] = 1
    else:
        flat[[0, 1, 9_999_998, 9_999_999, 10_000_000, 20_000_000]] = 1
        flat[10_000_005:20_000_000] = 1
    assert postprocess(mask, 0, 0) == reference.rle_encode(mask)


def test_areas_that_are_no_whole_numbers() -> None:
    mask = np.zeros((5, 5), np.uint8)
    mask[1:3, 1:4] = 1
    whole = reference.rle_encode(mask)
    assert [postprocess(mask, 0, area) for area in (5.5, 6.0, 6.5, -3, np.inf, -np.inf)] == [
        whole,
        "",
        "",
        whole,
        "",
        whole,
    ]
    for pair in ((np.nan, 0), (0, np.nan), (255, np.nan)):
        with pytest.raises(DataError, match="must be a number"):
            postprocess(mask, *pair)


@pytest.mark.parametrize("threshold", [-np.inf, -1e300, -0.5, 0.0, 0.1, 0.5, 1.0, 1.5, 1e300, np.inf])
def test_any_threshold_compares_as_numpy_does(threshold: float) -> None:
    values = np.array([[-np.inf, -1, -0.0, 0, 1e-45, 0.1, 0.5, 1, 2, 3e38, np.inf, np.nan]], np.float32)
    with np.errstate(over="ignore"):
        on = values > np.float32(threshold)
    assert postprocess(values, threshold, 0) == reference.rle_encode(on)


def test_areas_are_strictly_greater() -> None:
    mask = np.zeros((10, 10), np.uint8)
    mask[2:5, 2:6] = 255
    assert postprocess(mask, 128, 11) == reference.rle_encode(mask)
    assert postprocess(mask, 128, 12) == ""


def test_thresholds_are_strictly_greater() -> None:
    assert postprocess(np.array([[127, 128, 129]], np.uint8), 128, 0) == "3 1"
    assert postprocess(np.array([[254, 255]], np.uint8), 255, 0) == ""
    assert postprocess(np.array([[0, 1]], np.uint8), 0, 0) == "2 1"
    half = np.float32(0.5)
    assert (
        postprocess(np.array([[np.nextafter(half, np.float32(0)), half, np.nextafter(half, np.float32(1))]]), 0.5, 0)
        == "3 1"
    )
    tenth = np.array([[0.1]], np.float32)  # 0.1 in float32 is more than 0.1: both are compared as float32
    assert postprocess(tenth, 0.1, 0) == reference.postprocess(tenth, 0.1, 0) == ""


def test_levels_take_thresholds_between_and_beyond_them() -> None:
    levels = np.array([[0, 127, 128, 255]], np.uint8)
    for threshold in (-1, -0.5, 127.5, 254.9, 255.5, 256, 1e9, float("inf"), float("-inf")):
        assert postprocess(levels, threshold, 0) == reference.postprocess(levels, threshold, 0)


def test_what_is_not_a_number_is_off() -> None:
    assert postprocess(np.array([[np.nan, 0.9, np.inf, -np.inf]], np.float32), 0.5, 0) == "2 2"


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int16, bool])
def test_other_types_are_refused(dtype: type) -> None:
    with pytest.raises(DataError, match=np.dtype(dtype).name):
        postprocess(np.zeros((2, 2), dtype), 0, 0)


@pytest.mark.parametrize("shape", [(4,), (1, 2, 2), ()])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"\(H, W\)"):
        postprocess(np.zeros(shape, np.float32), 0.5, 0)
