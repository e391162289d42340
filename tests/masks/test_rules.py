"""Rules on images and batches: gate, presence, threshold and area; threads; and what the kernels receive."""

from __future__ import annotations

import sys
import threading
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from support import reference
from support.shapes import smooth_map

from cloudrt.errors import DataError
from cloudrt.masks.postprocess import apply_rules, postprocess, postprocess_batch, postprocess_batches
from cloudrt.masks.rule import Rule


def blob(level: int, area: int = 20) -> NDArray[np.uint8]:
    """A (W, H) map with one rectangle of `area` pixels, 4 rows high, at `level`."""
    levels = np.zeros((12, 9), np.uint8)
    levels[1 : 1 + area // 4, 2:6] = level
    return levels


def is_kept(levels: NDArray[np.uint8], rule: Rule, presence: int | None = None) -> bool:
    """Return whether the rule keeps the map: its text is empty or that of the whole map."""
    outputs = None if presence is None else np.array([presence], np.uint8)
    (text,) = apply_rules(levels[None], [rule], outputs)
    assert text in ("", reference.rle_encode(levels.T))
    return bool(text)


def test_gate_counts_the_pixels_above_its_threshold() -> None:
    levels = blob(180)
    assert is_kept(levels, Rule(100, 0, gate_threshold=179, gate_pixels=20))
    assert not is_kept(levels, Rule(100, 0, gate_threshold=179, gate_pixels=21))
    assert not is_kept(levels, Rule(100, 0, gate_threshold=180, gate_pixels=1))
    assert is_kept(levels, Rule(100, 0, gate_threshold=255, gate_pixels=0))
    assert not is_kept(levels, Rule(100, 0, gate_threshold=255, gate_pixels=1))
    apart = blob(180)
    apart[10, 8] = 200  # the gate counts every pixel, whatever its component
    assert apply_rules(apart[None], [Rule(100, 5, 179, 21)]) == [reference.rle_encode(blob(180).T)]


def test_presence_below_the_rule_empties_the_class() -> None:
    levels = blob(180)
    assert is_kept(levels, Rule(100, 0, presence=50), 50)
    assert not is_kept(levels, Rule(100, 0, presence=50), 49)
    assert is_kept(levels, Rule(100, 0, presence=0), 0)
    assert is_kept(levels, Rule(100, 0, presence=50))  # the artifact has no such output


def test_rule_thresholds_and_areas_are_strictly_greater() -> None:
    assert is_kept(blob(101), Rule(100, 19))
    assert not is_kept(blob(100), Rule(100, 19))
    assert not is_kept(blob(101), Rule(100, 20))


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
    with pytest.raises(DataError, match="each class needs"):
        apply_rules(
            np.zeros(shape, np.uint8), [Rule(1, 1)] * rules, None if presence is None else np.zeros(presence, np.uint8)
        )


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"threshold": 256}, "threshold must be within 0..255"),
        ({"threshold": -1}, "threshold must be within"),
        ({"min_area": -1}, "min_area must be within 0..2147483647"),
        ({"min_area": 2**31}, "min_area must be within"),
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
    assert Rule.from_dict({"threshold": 1, "min_area": 2}) == Rule(1, 2)
    with pytest.raises(DataError, match="not a Rule"):
        Rule.from_dict({"threshold": 1})


def batch(seed: int, images: int, classes: int = 3, height: int = 37, width: int = 70) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    maps = [[smooth_map(rng, height, width, 3).T for _ in range(classes)] for _ in range(images)]
    return np.ascontiguousarray(maps)


RULES = [Rule(130, 30), Rule(100, 0, 200, 40, 90), Rule(160, 10, 250, 25)]


def plain(levels: NDArray[np.uint8], presence: NDArray[np.uint8] | None) -> list[list[str]]:
    """Each rule as its docstring defines it, on whole arrays."""
    rows = []
    for i, image in enumerate(levels):
        texts = []
        for c, rule in enumerate(RULES):
            absent = presence is not None and presence[i, c] < rule.presence
            gated = (image[c] > rule.gate_threshold).sum() < rule.gate_pixels
            texts.append("" if absent or gated else reference.postprocess(image[c].T, rule.threshold, rule.min_area))
        rows.append(texts)
    return rows


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("images", [0, 1, 2, 7])
@pytest.mark.parametrize("with_presence", [False, True])
def test_a_batch_is_its_images(threads: int, images: int, with_presence: bool) -> None:
    levels = batch(images, images) if images else np.zeros((0, 3, 70, 37), np.uint8)
    presence = np.random.default_rng(images).integers(0, 256, (images, 3), dtype=np.uint8) if with_presence else None
    expected = plain(levels, presence)
    assert postprocess_batch(levels, RULES, presence, threads) == expected
    for i in range(images):
        assert apply_rules(levels[i], RULES, None if presence is None else presence[i]) == expected[i]


def test_a_batch_may_have_any_memory_layout() -> None:
    levels = batch(3, 4)
    expected = plain(levels, None)
    assert any(text for row in expected for text in row)
    doubled = np.repeat(levels, 2, axis=3)
    read_only = levels.copy()
    read_only.flags.writeable = False
    masked = np.ma.array(levels, mask=levels > 200)
    turned = np.ascontiguousarray(levels[:, ::-1])[:, ::-1]
    for form in (doubled[..., ::2], np.asfortranarray(levels), read_only, turned, masked):
        assert postprocess_batch(form, RULES, threads=2) == expected
    presence = np.random.default_rng(3).integers(0, 256, (4, 3), dtype=np.uint8)
    for certain in (np.asfortranarray(presence), np.ma.array(presence, mask=presence > 9)):
        assert postprocess_batch(levels, RULES, certain) == plain(levels, presence)


def test_a_batch_of_many_calls_and_one_without_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = batch(5, 7)
    expected = plain(levels, None)
    module = sys.modules["cloudrt.masks.postprocess"]
    monkeypatch.setattr(module, "_local", threading.local())
    monkeypatch.setattr(module, "_PIXELS_PER_COPY", 2 * 3 * 70 * 37)  # two images
    monkeypatch.setattr(module, "_TEXTS_BYTES", 0)  # a call ends after a text that is not empty
    for form in (levels, np.asfortranarray(levels)):
        assert postprocess_batch(form, RULES, threads=2) == postprocess_batch(form, RULES) == expected
    assert postprocess_batch(np.zeros((2, 0, 4, 5), np.uint8), []) == [[], []]


@pytest.mark.parametrize("layout", ["C", "F"])
def test_several_batches_are_each_of_them(layout: Literal["C", "F"], monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts are those of each batch: of any length, with and without presence, and parts of an array."""
    levels = batch(11, 9)
    presence = np.random.default_rng(1).integers(0, 256, (9, 3), dtype=np.uint8)
    ranges = [slice(0, 4), slice(4, 4), slice(4, 5), slice(7, 9), slice(2, 6)]
    batches = [
        (np.array(levels[some], order=layout) if number % 2 else levels[some], presence[some] if number % 3 else None)
        for number, some in enumerate(ranges)
    ]
    expected = [text for maps, certain in batches for row in plain(maps, certain) for text in row]
    assert sum(map(bool, expected)) > 5
    assert postprocess_batches(batches, RULES) == expected
    monkeypatch.setattr("cloudrt.masks.postprocess._TEXTS_BYTES", 0)  # a call ends after a text that is not empty
    monkeypatch.setattr("cloudrt.masks.postprocess._local", threading.local())
    assert postprocess_batches(batches, RULES) == expected
    assert postprocess_batches([], RULES) == postprocess_batches([(levels[:0], None)], RULES) == []
    wrong: Any
    for wrong in (levels[:1].astype(np.int8), levels[:1, :, 1:].copy(), levels[:1, :, 1:], levels.tolist()):
        with pytest.raises(DataError, match=r"uint8|of one size"):
            postprocess_batches([batches[0], (wrong, None)], RULES)


def test_batch_rules_and_presence_must_match() -> None:
    levels = batch(3, 2)
    for wrong in (
        (levels[0], RULES),
        (levels, RULES[:2]),
        (levels, RULES, np.zeros((2, 2), np.uint8)),
        (levels, RULES, np.zeros((2, 3), np.float32)),
        (levels.astype(np.float32), RULES),
        (levels, RULES, None, 0),
    ):
        with pytest.raises(DataError):
            postprocess_batch(*wrong)


def test_maps_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the output of an artifact nor its transpose."""
    from cloudrt.kernels import runs

    seen: list[Any] = []

    def maps_to_text(maps: NDArray[Any], *_: Any) -> int:
        seen.append(maps)
        return 0

    def maps_to_texts(maps: tuple[NDArray[np.int64], int, int], *rest: Any) -> int:
        addresses, *_ = maps
        seen.append(addresses)
        ends = rest[4]
        ends[:] = 0
        return len(addresses)

    monkeypatch.setattr(runs, "columns_to_text", maps_to_text)
    monkeypatch.setattr(runs, "rows_to_text", maps_to_text)
    monkeypatch.setattr(runs, "maps_to_texts", maps_to_texts)
    levels = batch(9, 2)
    single = levels.astype(np.float32)
    for array in (levels[0, 0].T, levels[0, 0], single[1, 2], single[1, 2].T):
        postprocess(array, 100, 5)
        assert np.shares_memory(seen.pop(), array)
    read_only = levels.copy()
    read_only.flags.writeable = False
    for array in (levels, read_only):
        apply_rules(array[1], RULES)
        assert seen.pop().tolist() == [array[1, c].ctypes.data for c in range(3)]
        postprocess_batches([(array[1:], None), (array, None)], RULES)
        assert seen.pop().tolist() == [array[i, c].ctypes.data for i in (1, 0, 1) for c in range(3)]
