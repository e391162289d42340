"""The mean of the highest values: by sorting, or by bisection if there are more of them than TensorRT sorts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cloudrt.model.network import LARGEST_TOP_K, mean_of_highest


@pytest.mark.parametrize("count", [1, 7, LARGEST_TOP_K, LARGEST_TOP_K + 1, 9_000, 20_000])
@pytest.mark.parametrize("kind", ["even", "low", "ties", "zeros", "ones"])
def test_it_is_the_mean_of_the_sorted_values(count: int, kind: str) -> None:
    random = np.random.default_rng(0)
    values = random.random((2, 3, 20_000), np.float32)
    drawn: dict[str, np.ndarray] = {
        "even": values,
        "low": values**8,
        "ties": np.round(values * 3) / 3,
        "zeros": np.where(values < 0.9, 0, values),
        "ones": np.where(values < 0.5, 1, values),
    }
    values = drawn[kind].astype(np.float32)
    wanted = np.sort(values.astype(np.float64), axis=2)[:, :, -count:].mean(axis=2)
    found = mean_of_highest(torch.from_numpy(values), count).numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-6)
