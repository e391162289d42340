"""The search of rules, against every pair of threshold and min area tried one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from scipy import ndimage
from support import reference
from support.shapes import MASKS, smooth_map

from cloudrt.errors import DataError
from cloudrt.masks.postprocess import apply_rules
from cloudrt.masks.rle import pack_mask, unpack_mask
from cloudrt.masks.rule import Rule
from cloudrt.search.tables import (
    MIN_AREAS,
    BestRule,
    LabelledMaps,
    Sweeper,
    best_rules,
    measure,
    min_areas_for,
    search_rules,
)

THRESHOLDS = (0, 90, 120, 135, 150, 170, 254, 255)
AREAS = (0, 1, 5, 20, 60, 200, 600, 5000)


def case(seed: int, images: int = 5, classes: int = 2) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return (N, C, H, W) levels, and masks that resemble them; some masks are empty, and some levels all 0."""
    rng = np.random.default_rng(seed)
    height, width = 33, 47
    levels = np.empty((images, classes, height, width), np.uint8)
    truth = np.zeros_like(levels)
    for index in np.ndindex(images, classes):
        levels[index] = smooth_map(rng, height, width, 1.5 + 3 * rng.random())
        if rng.random() < 0.7:
            likeness = levels[index] * 0.7 + 0.3 * smooth_map(rng, height, width, 3)
            truth[index] = reference.keep_large((likeness > 140).astype(np.uint8), int(rng.integers(60)))
        elif rng.random() < 0.3:
            levels[index] = 0
    return levels, truth


def search(
    levels: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    thresholds: tuple[int, ...] = THRESHOLDS,
    areas: tuple[int, ...] = AREAS,
    threads: int | None = None,
    advance: Callable[[int], object] | None = None,
) -> list[BestRule]:
    packed = np.stack([[pack_mask(mask) for mask in image] for image in truth])
    return search_rules(np.ascontiguousarray(levels.transpose(0, 1, 3, 2)), packed, thresholds, areas, threads, advance)


@pytest.mark.parametrize("seed", range(8))
def test_equals_brute_force(seed: int) -> None:
    levels, truth = case(seed)
    for c, found in enumerate(search(levels, truth)):
        threshold, min_area, dice = reference.search(levels[:, c], truth[:, c], THRESHOLDS, AREAS)
        assert found.rule == Rule(threshold, min_area)
        assert found.dice == pytest.approx(dice, abs=1e-12)


def test_every_single_pair_has_the_dice_of_brute_force() -> None:
    levels, truth = case(20, images=3, classes=1)
    for threshold in THRESHOLDS:
        for area in AREAS:
            (found,) = search(levels, truth, (threshold,), (area,))
            assert found.rule == Rule(threshold, area)
            assert found.dice == pytest.approx(
                reference.search(levels[:, 0], truth[:, 0], [threshold], [area])[2], abs=1e-12
            )


def test_order_of_what_is_tried_does_not_matter() -> None:
    levels, truth = case(3)
    assert search(levels, truth, THRESHOLDS[::-1], AREAS[::-1]) == search(levels, truth)


def test_of_equal_rules_the_lowest_is_taken() -> None:
    levels = np.zeros((2, 1, 6, 8), np.uint8)
    levels[:, :, 1:4, 1:5] = 200
    truth = (levels > 0).astype(np.uint8)
    assert search(levels, truth, (150, 100, 50), (7, 3, 5)) == [BestRule(Rule(50, 3), 1.0)]


def test_empty_masks_are_best_predicted_by_an_empty_mask() -> None:
    levels, truth = case(4)
    (found, _) = search(levels, np.zeros_like(truth), (10, 255), (0,))
    assert found == BestRule(Rule(255, 0), 1.0)


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    levels, truth = case(5, images=9)
    alone = search(levels, truth, threads=1)
    assert all(search(levels, truth, threads=threads) == alone for threads in (2, 5, None))


def test_progress_is_reported_once_per_image() -> None:
    levels, truth = case(6, images=4, classes=1)
    told: list[int] = []
    search(levels, truth, (100,), (0,), 2, told.append)
    assert told == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("probability", "truth", "thresholds", "areas"),
    [
        (np.zeros((2, 1, 8, 4), np.uint8), np.zeros((2, 1, 5), np.uint8), (1,), (1,)),
        (np.zeros((2, 1, 8, 4), np.uint8), np.zeros((1, 1, 4), np.uint8), (1,), (1,)),
        (np.zeros((2, 1, 8, 4), np.uint8), np.zeros((2, 2, 4), np.uint8), (1,), (1,)),
        (np.zeros((0, 1, 8, 4), np.uint8), np.zeros((0, 1, 4), np.uint8), (1,), (1,)),
        (np.zeros((2, 8, 4), np.uint8), np.zeros((2, 1, 4), np.uint8), (1,), (1,)),
        (np.zeros((2, 1, 8, 4), np.float32), np.zeros((2, 1, 4), np.uint8), (1,), (1,)),
        (np.zeros((2, 1, 8, 4), np.uint8), np.zeros((2, 1, 4), np.uint8), (), (1,)),
        (np.zeros((2, 1, 8, 4), np.uint8), np.zeros((2, 1, 4), np.uint8), (1,), ()),
        (np.zeros((2, 1, 8, 4), np.uint8), np.zeros((2, 1, 4), np.uint8), (300,), (1,)),
    ],
)
def test_what_cannot_be_searched_is_refused(
    probability: NDArray[np.uint8], truth: NDArray[np.uint8], thresholds: tuple[int, ...], areas: tuple[int, ...]
) -> None:
    with pytest.raises(DataError):
        search_rules(probability, truth, thresholds, areas)


def tables_by_hand(
    levels: NDArray[np.uint8], truth: NDArray[np.uint8], thresholds: list[int], areas: list[int]
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the pixels and true pixels that each threshold and min area keeps; SciPy labels the components."""
    pixels, overlaps = [], []
    for threshold in thresholds:
        components, _ = ndimage.label(levels > threshold, structure=np.ones((3, 3)))
        area = np.bincount(components.ravel())
        area[0] = 0
        kept = [area[components] > least for least in areas]
        pixels.append([int(mask.sum()) for mask in kept])
        overlaps.append([int((mask & (truth == 1)).sum()) for mask in kept])
    return pixels, overlaps


def assert_sweep_is_exact(
    levels: NDArray[np.uint8], truth: NDArray[np.uint8], thresholds: list[int], areas: list[int]
) -> None:
    height, width = levels.shape
    sweeper = Sweeper(height, width, np.array(thresholds), np.array(areas))
    for _ in range(2):  # the second time, the buffers hold the first results
        sweeper.sweep(np.ascontiguousarray(levels), np.ascontiguousarray(truth))
        pixels, overlaps = tables_by_hand(levels, truth, thresholds, areas)
        assert sweeper.area.tolist() == pixels
        assert sweeper.overlap.tolist() == overlaps


@pytest.mark.parametrize("name", [name for name, mask in MASKS.items() if mask.size])
def test_sweep_of_hard_masks(name: str) -> None:
    mask = MASKS[name]
    truth = np.random.default_rng(1).integers(0, 2, mask.shape, dtype=np.uint8)
    for levels in (
        mask,
        mask * 255,
        200 - mask * 100,
        mask * 90 + np.arange(mask.size, dtype=np.uint8).reshape(mask.shape) % 7,
    ):
        assert_sweep_is_exact(levels.astype(np.uint8), truth, list(range(256)), [0, 1, 2, 3, 10, 50, 10_000])


@pytest.mark.parametrize("seed", range(12))
def test_sweep_of_synthetic_maps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(1, 70, 2))
    levels = (
        smooth_map(rng, height, width, 1 + seed / 3)
        if seed % 3
        else rng.integers(0, 256 if seed % 2 else 4, (height, width), dtype=np.uint8)
    )
    truth = rng.integers(0, 2, (height, width), dtype=np.uint8)
    thresholds = list(range(256)) if seed % 2 else sorted(rng.choice(256, 9, replace=False).tolist())
    areas = np.unique(np.append(rng.integers(0, height * width, 6), 0)).tolist()
    assert_sweep_is_exact(levels, truth, thresholds, areas)


sweep_maps = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda shape: st.tuples(
        arrays.arrays(np.uint8, shape, elements=st.integers(0, 5)),
        arrays.arrays(np.uint8, shape, elements=st.integers(0, 1)),
    )
)


@given(sweep_maps, st.sets(st.integers(0, 6), min_size=1), st.sets(st.integers(0, 12), min_size=1))
@settings(max_examples=300)
def test_sweep_of_any_map(
    maps: tuple[NDArray[np.uint8], NDArray[np.uint8]], thresholds: set[int], areas: set[int]
) -> None:
    assert_sweep_is_exact(*maps, sorted(thresholds), sorted(areas))


def labelled(seed: int, images: int = 6, classes: int = 2, presence: bool = False) -> list[LabelledMaps]:
    levels, truth = case(seed, images, classes)
    rng = np.random.default_rng(seed)
    return [
        LabelledMaps(
            np.ascontiguousarray(one.transpose(0, 2, 1)),
            np.stack([pack_mask(mask) for mask in masks]),
            rng.integers(0, 256, classes, dtype=np.uint8) if presence else None,
        )
        for one, masks in zip(levels, truth, strict=True)
    ]


def test_the_tables_hold_the_dice_of_every_rule_gates_and_presence_included() -> None:
    maps = labelled(11, presence=True)
    tables = measure(maps, len(maps), THRESHOLDS, AREAS)
    rng = np.random.default_rng(0)
    gates = {"empty": 0, "shown": 0}
    for _ in range(60):
        rule = Rule(
            int(rng.choice(THRESHOLDS)),
            int(rng.choice(AREAS)),
            int(rng.integers(100, 256)),
            int(rng.integers(0, 300)),
            int(rng.integers(0, 200)),
        )
        for c in range(2):
            expected = []
            for one in maps:
                truth = unpack_mask(one.truth[c], (33, 47))
                assert one.presence is not None
                (text,) = apply_rules(one.levels[c : c + 1], [rule], one.presence[c : c + 1])
                expected.append(reference.dice(reference.rle_decode(text, (33, 47)), truth))
                gates["shown" if text else "empty"] += 1
            assert tables.of_rule(c, rule).tolist() == pytest.approx(expected, abs=1e-15)
    assert min(gates.values()) > 50
    with pytest.raises(DataError, match="was not searched"):
        tables.of_rule(0, Rule(91, 0))


def test_means_are_summed_image_by_image() -> None:
    maps = labelled(12, images=7)
    tables = measure(maps, 7, THRESHOLDS, AREAS, threads=3)
    for c, found in enumerate(best_rules(tables)):
        t, a = THRESHOLDS.index(found.rule.threshold), AREAS.index(found.rule.min_area)
        total = 0.0
        for n in range(7):
            total += float(tables.dice[c, n, t, a])
        assert found.dice == total / 7


def test_maps_are_read_lazily_and_few_are_held() -> None:
    read: list[int] = []
    done: list[int] = []
    leads: list[int] = []
    maps = labelled(13, images=30, classes=1)

    def reading() -> Iterator[LabelledMaps]:
        for n, one in enumerate(maps):
            read.append(n)
            yield one

    def advance(_: int) -> None:
        done.append(1)
        leads.append(len(read) - len(done))

    measure(reading(), 30, (100,), (0,), threads=2, advance=advance)
    assert len(read) == 30
    assert max(leads) <= 4


def test_images_that_differ_are_refused() -> None:
    maps = labelled(14, images=3)
    other = labelled(14, images=1, classes=1)
    with pytest.raises(DataError, match="have the same shape"):
        measure([*maps, *other], 4)
    with pytest.raises(DataError, match="more images"):
        measure(maps, 2)
    with pytest.raises(DataError, match="no image"):
        measure([], 2)
    with pytest.raises(DataError, match="or none; found both"):
        measure([maps[0], labelled(14, presence=True)[1]], 2)
    assert measure(maps, 50).dice.shape == (2, 3, 256, len(MIN_AREAS))  # fewer than announced: some could not be read


def test_min_areas_are_the_same_shares_of_any_grid() -> None:
    assert min_areas_for((350, 525)) == MIN_AREAS
    assert min_areas_for((700, 1050)) == tuple(4 * area for area in MIN_AREAS)
    small = min_areas_for((35, 52))
    assert small[0] == 0 and len(set(small)) == len(small) and max(small) < 35 * 52


def test_the_loss_is_the_binary_cross_entropy() -> None:
    """Compared with PyTorch's, in float64."""
    levels, truth = case(3, images=6)
    found = measure(labelled(3, images=6), 6, THRESHOLDS, AREAS).loss
    probability = torch.from_numpy((levels + 0.5) / 256)
    wanted = torch.nn.functional.binary_cross_entropy(probability, torch.from_numpy(truth).double(), reduction="none")
    np.testing.assert_allclose(found, wanted.mean(dim=(2, 3)).T.numpy(), rtol=1e-12)
