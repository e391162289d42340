"""The bisection that finds which layers stay in fp32, on gates whose answer is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from cloudrt.export.keep import order_by_sensitivity, smallest_kept
from hypothesis import given
from hypothesis import strategies as st


def additive(noise: dict[str, float], budget: float) -> tuple[Callable[..., float], Callable[..., bool], list[int]]:
    """Return a sensitivity function and a gate, for which errors of layers add up, and a list of their call counts."""
    calls = [0, 0]

    def sensitivity(lowered: Sequence[str]) -> float:
        calls[0] += 1
        return sum(noise[layer] for layer in lowered)

    def passes(kept: Sequence[str]) -> bool:
        calls[1] += 1
        return sum(noise.values()) - sum(noise[layer] for layer in kept) <= budget

    return sensitivity, passes, calls


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(0, 300))
def test_what_is_kept_passes_and_none_of_it_could_be_lowered(values: list[int], budget: int) -> None:
    noise = {f"layer{i}": float(value) for i, value in enumerate(values)}
    if sum(values) <= budget:
        return  # the gate passes with nothing kept: no bisection is needed
    sensitivity, passes, _ = additive(noise, budget)
    kept = smallest_kept(order_by_sensitivity(list(noise), sensitivity), passes, trials=1000)
    assert passes(kept)
    for layer in kept:
        assert not passes([other for other in kept if other != layer]), layer


@pytest.mark.parametrize("culprits", [{3}, {0, 199}, {17, 18, 19}, {5, 60, 111, 180}])
def test_a_few_culprits_among_many_layers_are_found_exactly(culprits: set[int]) -> None:
    """As with overflow in fp16: each of a few layers exceeds the limit alone, the others have almost no error."""
    noise = {f"layer{i}": 100.0 if i in culprits else 0.001 for i in range(200)}
    sensitivity, passes, calls = additive(noise, 1.0)
    kept = smallest_kept(order_by_sensitivity(list(noise), sensitivity), passes)
    assert set(kept) == {f"layer{i}" for i in culprits}
    assert calls[0] <= 24
    assert calls[1] <= 40


def test_with_an_exact_ranking_the_fewest_layers_are_kept() -> None:
    """As in int8: each layer adds some error, and those with the largest must stay."""
    noise = {f"layer{i}": float((i * 37) % 64) for i in range(64)}
    budget = sum(sorted(noise.values())[:56])
    sensitivity, passes, _ = additive(noise, budget)
    kept = smallest_kept(order_by_sensitivity(list(noise), sensitivity, splits=64), passes)
    assert sorted(noise[layer] for layer in kept) == list(range(56, 64))


def test_layers_that_are_undecided_after_the_last_trial_stay_in_fp32() -> None:
    noise = {f"layer{i}": 1.0 for i in range(32)}
    sensitivity, passes, calls = additive(noise, 15.0)
    kept = smallest_kept(order_by_sensitivity(list(noise), sensitivity), passes, trials=2)
    assert passes(kept)
    assert calls[1] == 3  # two trials, and the assertion above
    assert 17 <= len(kept) < 32


def test_one_layer_alone_is_kept() -> None:
    assert smallest_kept(["only"], bool) == ["only"]
    assert order_by_sensitivity(["only"], lambda _: 1.0) == ["only"]
