"""Probability to text: byte for byte the notebook's answer, and components as OpenCV, scipy and cc3d see them."""

from __future__ import annotations

from typing import Any

import cc3d
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from scipy import ndimage
from shapes import MASKS, checkerboard, comb, smooth_map, spiral

from cloudrt.errors import DataError
from cloudrt.postprocess import Rule, Runs, apply_rules, postprocess
from cloudrt.rle import rle_decode

AREAS = (0, 1, 2, 3, 10, 50, 10_000)


def layouts(array: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """The same values, lying in memory in every way that users hand them over."""
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
    """All or nothing, at the area itself and one below."""
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
@settings(max_examples=200, deadline=None)
def test_any_map(levels: NDArray[np.uint8], threshold: int, min_area: int) -> None:
    expected = reference.postprocess(levels, threshold, min_area)
    assert postprocess(levels, threshold, min_area) == expected
    assert postprocess(np.asfortranarray(levels, np.float32), threshold, min_area) == expected


@given(noise)
@settings(max_examples=100, deadline=None)
def test_components_are_those_of_scipy_and_cc3d(levels: NDArray[np.uint8]) -> None:
    mask = (levels > 1).astype(np.uint8)  # cc3d 4.1.1 marks pixels that are off where the mask is bool
    runs = Runs(mask.shape[1], mask.shape[0])
    count = runs.find(np.ascontiguousarray(levels.T), 1)
    sums = np.zeros((mask.shape[1], mask.shape[0] + 1), np.int32)
    truth = levels.T % 2
    np.cumsum(truth, axis=1, out=sums[:, 1:])
    area, overlap = runs.component_overlaps(sums) if count else (np.empty(0, int), np.empty(0, int))

    for labels, found in (
        ndimage.label(mask, structure=np.ones((3, 3))),
        cc3d.connected_components(mask, connectivity=8, return_N=True),
    ):
        expected = [((labels == n).sum(), ((labels == n) & (truth.T == 1)).sum()) for n in range(1, found + 1)]
        assert sorted(zip(area.tolist(), overlap.tolist(), strict=True)) == sorted(expected)
    kept = cc3d.dust(mask, threshold=5, connectivity=8)  # drops what is smaller than 5
    assert np.array_equal(rle_decode(postprocess(levels, 1, 4), mask.shape), kept)


def test_buffers_carry_nothing_from_one_map_to_the_next() -> None:
    rng = np.random.default_rng(1)
    runs = Runs(40, 30)
    for name in ("dense", "empty", "smooth", "full"):
        levels = {
            "dense": checkerboard(40, 30),
            "empty": np.zeros((40, 30), np.uint8),
            "smooth": smooth_map(rng, 40, 30),
            "full": np.full((40, 30), 255, np.uint8),
        }[name]
        count = runs.find(levels, 0)
        assert (runs.text(0) if count else "") == reference.rle_encode(levels.T), name


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


def blob(level: int, area: int = 20) -> NDArray[np.uint8]:
    """A (W, H) map with one rectangle of `area` pixels, 4 rows high, at `level`."""
    levels = np.zeros((12, 9), np.uint8)
    levels[1 : 1 + area // 4, 2:6] = level
    return levels


def ruled(levels: NDArray[np.uint8], rule: Rule, presence: int | None = None) -> bool:
    """Whether anything is left of a map; what is left must be the whole of it."""
    outputs = None if presence is None else np.array([presence], np.uint8)
    (text,) = apply_rules(levels[None], [rule], outputs)
    assert text in ("", reference.rle_encode(levels.T))
    return bool(text)


def test_gate_counts_the_pixels_above_its_threshold() -> None:
    levels = blob(180)
    assert ruled(levels, Rule(100, 0, gate_threshold=179, gate_pixels=20))
    assert not ruled(levels, Rule(100, 0, gate_threshold=179, gate_pixels=21))
    assert not ruled(levels, Rule(100, 0, gate_threshold=180, gate_pixels=1))
    assert ruled(levels, Rule(100, 0, gate_threshold=255, gate_pixels=0))
    assert not ruled(levels, Rule(100, 0, gate_threshold=255, gate_pixels=1))
    apart = blob(180)
    apart[10, 8] = 200  # the gate counts every pixel, whatever its component
    assert apply_rules(apart[None], [Rule(100, 5, 179, 21)]) == [reference.rle_encode(blob(180).T)]


def test_presence_below_the_rule_empties_the_class() -> None:
    levels = blob(180)
    assert ruled(levels, Rule(100, 0, presence=50), 50)
    assert not ruled(levels, Rule(100, 0, presence=50), 49)
    assert ruled(levels, Rule(100, 0, presence=0), 0)
    assert ruled(levels, Rule(100, 0, presence=50))  # the artifact has no such output


def test_rule_thresholds_and_areas_are_strictly_greater() -> None:
    assert ruled(blob(101), Rule(100, 19))
    assert not ruled(blob(100), Rule(100, 19))
    assert not ruled(blob(101), Rule(100, 20))


def test_each_class_has_its_own_rule() -> None:
    rng = np.random.default_rng(2)
    levels = np.stack([smooth_map(rng, 52, 35) for _ in range(4)])
    rules = [Rule(100, 50), Rule(150, 0), Rule(128, 10, 200, 30), Rule(90, 100, presence=99)]
    presence = np.array([0, 0, 0, 98], np.uint8)
    texts = apply_rules(levels, rules, presence)
    assert texts[:3] == [
        reference.postprocess(one.T, rule.threshold, rule.min_area) if (one > 200).sum() >= rule.gate_pixels else ""
        for one, rule in zip(levels[:3], rules[:3], strict=True)
    ]
    assert texts[3] == ""


@pytest.mark.parametrize(
    ("shape", "rules", "presence"), [((2, 5, 4), 3, None), ((3, 5, 4), 2, None), ((5, 4), 5, None), ((2, 5, 4), 2, 1)]
)
def test_maps_rules_and_presence_must_belong_together(shape: tuple[int, ...], rules: int, presence: int | None) -> None:
    with pytest.raises(DataError, match="a class"):
        apply_rules(
            np.zeros(shape, np.uint8), [Rule(1, 1)] * rules, None if presence is None else np.zeros(presence, np.uint8)
        )


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"threshold": 256}, "threshold is within 0..255"),
        ({"threshold": -1}, "threshold is within"),
        ({"min_area": -1}, "min_area is within 0..2147483647"),
        ({"min_area": 2**31}, "min_area is within"),
        ({"gate_threshold": 256}, "gate_threshold"),
        ({"gate_pixels": -5}, "gate_pixels"),
        ({"presence": 256}, "presence"),
        ({"threshold": 1.0}, "whole number, found 1.0"),
        ({"threshold": True}, "whole number, found True"),
        ({"threshold": "1"}, "whole number, found '1'"),
        ({"threshold": None}, "whole number, found None"),
        ({"treshold": 1}, "not a Rule"),
    ],
)
def test_rules_are_validated(values: dict[str, Any], named: str) -> None:
    with pytest.raises(DataError, match=named):
        Rule.from_dict({"threshold": 1, "min_area": 1} | values)


def test_rules_round_trip() -> None:
    rule = Rule(1, 2, 3, 4, 5)
    assert Rule.from_dict(rule.to_dict()) == rule
    with pytest.raises(DataError, match="not a Rule"):
        Rule.from_dict({"threshold": 1})
