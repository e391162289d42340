"""RLE text to masks and back, compared with the notebook's code and with pycocotools."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from pycocotools import mask as coco
from support import reference
from support.shapes import MASKS

from cloudrt.errors import RleError
from cloudrt.labels import Labels
from cloudrt.masks.rle import pack_mask, rle_decode, rle_encode, rle_to_submit_grid, unpack_mask

# pycocotools 2.0.11 warns with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

shapes = st.tuples(st.integers(1, 24), st.integers(1, 24))
masks = shapes.flatmap(lambda shape: arrays.arrays(np.uint8, shape, elements=st.integers(0, 1)))


def coco_mask(text: str, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """The mask that pycocotools reads: its counts are lengths of off, on, off, ... runs, in the same pixel order."""
    counts, end = [], 0
    numbers = [int(token) for token in text.split()]
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        counts += [start - 1 - end, length]
        end = start - 1 + length
    counts.append(shape[0] * shape[1] - end)
    return np.asarray(coco.decode(coco.frPyObjects({"size": list(shape), "counts": counts}, *shape)), np.uint8)


def check(mask: NDArray[Any]) -> None:
    text = rle_encode(mask)
    assert text == reference.rle_encode(mask)
    decoded = rle_decode(text, mask.shape)
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, mask != 0)
    assert np.array_equal(decoded, reference.rle_decode(text, mask.shape))
    if mask.size:
        assert np.array_equal(coco_mask(text, mask.shape), decoded)


@pytest.mark.parametrize("name", MASKS)
def test_hard_masks(name: str) -> None:
    check(MASKS[name])


@given(masks)
@settings(max_examples=150)
def test_any_mask(mask: NDArray[np.uint8]) -> None:
    check(mask)


def test_whole_grids() -> None:
    rng = np.random.default_rng(0)
    for shape in ((350, 525), (1400, 2100)):
        mask = (rng.random(shape) < 0.1).astype(np.uint8)
        text = rle_encode(mask)
        assert text == reference.rle_encode(mask)
        assert np.array_equal(rle_decode(text, shape), mask)


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.uint16, np.int32, np.int64])
def test_masks_of_other_types_and_layouts(dtype: type[np.generic]) -> None:
    mask = MASKS["spiral"].astype(dtype)
    expected = reference.rle_encode(mask)
    wide = np.zeros((46, 46), dtype)
    wide[::2, ::2] = mask
    read_only = mask.copy()
    read_only.flags.writeable = False
    for same in (mask, np.asfortranarray(mask), wide[::2, ::2], mask[::-1, ::-1][::-1, ::-1], read_only):
        assert rle_encode(same) == expected
    negative = np.array([[-1, 0], [0, -1]], np.int8)
    assert rle_encode(negative) == "1 1 4 1"


@pytest.mark.parametrize("name", MASKS)
def test_masks_pack_and_unpack(name: str) -> None:
    mask = MASKS[name]
    bits = pack_mask(mask)
    assert bits.shape == ((mask.size + 7) // 8,) and bits.dtype == np.uint8
    assert np.array_equal(unpack_mask(bits, mask.shape), mask)
    assert np.array_equal(pack_mask(np.asfortranarray(mask)), bits)
    assert np.array_equal(np.unpackbits(bits)[: mask.size], mask.T.flatten())  # bits lie in RLE order


def test_worked_example() -> None:
    assert rle_encode(np.array([[0, 1, 0], [1, 1, 0]])) == "2 3"
    assert rle_decode("2 3", (2, 3)).tolist() == [[0, 1, 0], [1, 1, 0]]


def test_default_grid_is_that_of_a_submission() -> None:
    assert rle_decode("").shape == (350, 525)
    assert rle_decode("183750 1")[-1, -1] == 1


@pytest.mark.parametrize("text", ["", " ", "\n", "\t \r\n"])
def test_blank_is_empty(text: str) -> None:
    assert not rle_decode(text, (3, 4)).any()


@pytest.mark.parametrize("text", ["2 3 8 1", " 2 3 8 1", "2 3 8 1 ", "2\t3\n8\r\n1\n", "  2   3  8 1", "002 3 08 0001"])
def test_white_space_and_leading_zeros_do_not_matter(text: str) -> None:
    assert np.array_equal(rle_decode(text, (3, 4)), reference.rle_decode("2 3 8 1", (3, 4)))


def test_runs_that_touch_are_read_as_one() -> None:
    assert rle_encode(rle_decode("2 3 5 2", (3, 4))) == "2 5"


HUGE = "9" * 400

MALFORMED = [
    # text on a 3x4 grid, number of the token, what is shown of it, words of the reason
    ("1", 1, "'1'", "odd"),
    ("1 2 5", 3, "'5'", "odd"),
    ("0 1", 1, "'0'", "zero"),
    ("1 0", 2, "'0'", "zero"),
    ("000 1", 1, "'000'", "zero"),
    ("1 1 5 0", 4, "'0'", "zero"),
    ("-1 2", 1, "'-1'", "positive whole number"),
    ("1 -2", 2, "'-2'", "positive whole number"),
    ("+1 1", 1, "'+1'", "positive whole number"),
    ("1.0 1", 1, "'1.0'", "positive whole number"),
    ("1 1e1", 2, "'1e1'", "positive whole number"),
    ("1,2", 1, "'1,2'", "positive whole number"),
    ("1 x", 2, "'x'", "positive whole number"),
    ("nan", 1, "'nan'", "positive whole number"),
    ("1_0 1", 1, "'1_0'", "positive whole number"),
    ("0x1 1", 1, "'0x1'", "positive whole number"),
    ("1 2 2 1", 3, "'2'", "ascend"),
    ("5 1 1 1", 3, "'1'", "ascend"),
    ("5 2 5 2", 3, "'5'", "ascend"),
    ("1 5 5 1", 3, "'5'", "ascend"),
    ("13 1", 1, "'13'", "out of bounds: the 4x3 grid has 12 pixels"),
    ("1 13", 2, "'13'", "out of bounds"),
    ("12 2", 2, "'2'", "out of bounds"),
    ("2 1 12 2", 4, "'2'", "out of bounds"),
    (f"{HUGE} 1", 1, "'99999999999999999999...'", "out of bounds"),
    (f"1 {HUGE}", 2, "'99999999999999999999...'", "out of bounds"),
    ("9223372036854775808 1", 1, "'9223372036854775808'", "out of bounds"),
    ("18446744073709551617 1", 1, "'18446744073709551617'", "out of bounds"),
    ("4294967297 1", 1, "'4294967297'", "out of bounds"),
    ("1 18446744073709551616", 2, "'18446744073709551616'", "out of bounds"),
    ("１ 1", 1, "'１'", "positive whole number"),
    ("1 ١", 2, "'١'", "positive whole number"),
    ("1\u00a01", 1, r"'1\xa01'", "positive whole number"),
    ("\u00a0", 1, r"'\xa0'", "positive whole number"),
    ("\x0b", 1, r"'\x0b'", "positive whole number"),
    ("1 1\x0c", 2, r"'1\x0c'", "positive whole number"),
    ("1 1 \x85 1", 3, r"'\x85'", "positive whole number"),
    ("1 1\0", 2, r"'1\x00'", "positive whole number"),
    ("\0", 1, r"'\x00'", "positive whole number"),
    ("1 1 \ud800", 3, r"'\ud800'", "positive whole number"),
    ("é 1", 1, "'é'", "positive whole number"),
]


@pytest.mark.parametrize(("text", "token", "shown", "reason"), MALFORMED)
def test_malformed_text_names_the_token_and_its_position(text: str, token: int, shown: str, reason: str) -> None:
    with pytest.raises(RleError) as caught:
        rle_decode(text, (3, 4))
    message = str(caught.value)
    assert message.startswith(f"RLE token {token} ({shown}) ")
    assert reason in message
    assert len(message.splitlines()) == 1 and len(message) < 200


@pytest.mark.parametrize("value", [None, 3, float("nan"), b"1 1", ["1 1"]])
def test_only_text_is_decoded(value: Any) -> None:
    with pytest.raises(RleError, match=f"found {type(value).__name__}"):
        rle_decode(value, (3, 4))


@pytest.mark.parametrize("mask", [np.zeros(4, np.uint8), np.zeros((2, 2, 1), np.uint8), np.array(1)])
def test_only_two_dimensions_are_encoded(mask: NDArray[Any]) -> None:
    with pytest.raises(RleError, match=re.escape(str(mask.shape))):
        rle_encode(mask)


@pytest.mark.parametrize("dtype", [np.float32, np.complex64, object, "U1"])
def test_only_whole_numbers_are_encoded(dtype: Any) -> None:
    with pytest.raises(RleError, match="bool or integer"):
        rle_encode(np.zeros((2, 2), dtype))


def sound(text: str, size: int) -> bool:
    """Whether a text is valid: a slow reference."""
    tokens = [token for token in re.split("[ \t\r\n]", text) if token]
    if len(tokens) % 2 or not all(re.fullmatch("[0-9]+", token) for token in tokens):
        return False
    end = 0
    for start, length in zip(map(int, tokens[::2]), map(int, tokens[1::2]), strict=True):
        if start < 1 or length < 1 or start - 1 < end or start - 1 + length > size:
            return False
        end = start - 1 + length
    return True


digits_and_worse = st.text(st.sampled_from("0123456789 \t\n-+.,x\0é\u00a0\x0b"), max_size=24)
numbers = st.lists(st.integers(-1, 14), max_size=8).map(lambda found: " ".join(map(str, found)))


@given(st.one_of(st.text(max_size=20), digits_and_worse, numbers), shapes)
@settings(max_examples=500)
def test_fuzz_is_decoded_or_refused(text: str, shape: tuple[int, int]) -> None:
    if sound(text, shape[0] * shape[1]):
        assert np.array_equal(rle_decode(text, shape), reference.rle_decode(text, shape))
    else:
        with pytest.raises(RleError, match=r"token \d+ "):
            rle_decode(text, shape)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_grids_without_pixels(shape: tuple[int, int]) -> None:
    assert rle_decode("", shape).shape == shape
    with pytest.raises(RleError, match="out of bounds"):
        rle_decode("1 1", shape)


GRIDS = [
    Labels(("a",), (8, 12), (2, 3)),
    Labels(("a",), (6, 9), (2, 3)),  # blocks of nine: half is four and a half
    Labels(("a",), (6, 4), (2, 2)),
    Labels(("a",), (5, 14), (5, 7)),
    Labels(("a",), (5, 7), (5, 7)),
    Labels(("a",), (12, 1), (3, 1)),
    Labels(("a",), (600, 600), (1, 1)),  # a block of more pixels than 16 bits count
]


@pytest.mark.parametrize("labels", GRIDS, ids=lambda labels: f"{labels.label_grid}-{labels.submit_grid}")
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_blocks_equal_the_plain_loop(labels: Labels, share: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        mask = (rng.random(labels.label_grid) < share).astype(np.uint8)
        small = rle_to_submit_grid(reference.rle_encode(mask), labels)
        assert small.dtype == np.uint8
        assert np.array_equal(small, reference.shrink(mask, labels.block))


@pytest.mark.parametrize("labels", GRIDS, ids=lambda labels: f"{labels.label_grid}-{labels.submit_grid}")
def test_a_block_is_on_from_exactly_half(labels: Labels) -> None:
    (height, width), pixels = labels.block, labels.block[0] * labels.block[1]
    rng = np.random.default_rng(1)
    for count in {(pixels - 1) // 2, (pixels + 1) // 2}:
        block = rng.permutation(np.arange(pixels) < count).reshape(height, width)
        mask = np.tile(block, labels.submit_grid).astype(np.uint8)
        assert (rle_to_submit_grid(reference.rle_encode(mask), labels) == (2 * count >= pixels)).all()


def test_the_clouds_grid() -> None:
    rng = np.random.default_rng(2)
    mask = np.kron(rng.random((70, 105)) < 0.5, np.ones((20, 20))).astype(np.uint8)
    mask ^= (rng.random(mask.shape) < 0.2).astype(np.uint8)
    counts = mask.reshape(350, 4, 525, 4).sum(axis=(1, 3))
    assert np.array_equal(rle_to_submit_grid(reference.rle_encode(mask)), counts >= 8)
    with pytest.raises(RleError, match=r"token 1 .* is out of bounds: the 2100x1400 grid"):
        rle_to_submit_grid(f"{1400 * 2100 + 1} 1")
