"""The search of rules, against every pair of threshold and min area tried one by one."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from numpy.typing import NDArray
from shapes import MASKS, smooth_map

from cloudrt.errors import DataError
from cloudrt.postprocess import Rule
from cloudrt.search import Found, pack_mask, search_rules, unpack_mask

THRESHOLDS = (0, 90, 120, 135, 150, 170, 254, 255)
AREAS = (0, 1, 5, 20, 60, 200, 600, 5000)


def case(seed: int, images: int = 5, classes: int = 2) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(N, C, H, W) levels, and masks that resemble them; some masks are empty, and some maps."""
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
    jobs: int | None = None,
) -> list[Found]:
    packed = np.stack([[pack_mask(mask) for mask in image] for image in truth])
    return search_rules(np.ascontiguousarray(levels.transpose(0, 1, 3, 2)), packed, thresholds, areas, jobs)


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
    assert search(levels, truth, (150, 100, 50), (7, 3, 5)) == [Found(Rule(50, 3), 1.0)]


def test_nothing_true_is_best_predicted_by_nothing() -> None:
    levels, truth = case(4)
    (found, _) = search(levels, np.zeros_like(truth), (10, 255), (0,))
    assert found == Found(Rule(255, 0), 1.0)


def test_the_answer_does_not_depend_on_jobs() -> None:
    levels, truth = case(5, images=9)
    alone = search(levels, truth, jobs=1)
    assert all(search(levels, truth, jobs=jobs) == alone for jobs in (2, 5, None))


def test_progress_is_told_once_an_image() -> None:
    levels, truth = case(6, images=4, classes=1)
    told: list[int] = []
    packed = np.stack([[pack_mask(mask) for mask in image] for image in truth])
    search_rules(np.ascontiguousarray(levels.transpose(0, 1, 3, 2)), packed, (100,), (0,), 2, told.append)
    assert told == [1, 1, 1, 1]


@pytest.mark.parametrize("name", MASKS)
def test_masks_pack_and_unpack(name: str) -> None:
    mask = MASKS[name]
    bits = pack_mask(mask)
    assert bits.shape == ((mask.size + 7) // 8,) and bits.dtype == np.uint8
    assert np.array_equal(unpack_mask(bits, mask.shape), mask)
    assert np.array_equal(pack_mask(np.asfortranarray(mask)), bits)
    assert np.array_equal(np.unpackbits(bits)[: mask.size], mask.T.flatten())  # bits lie in RLE order


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
