"""Test-time augmentation: the mean of the logits over flips, flipped back where the maps are small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.networks import make_checkpoint

from cloudrt.model.network import InferenceGraph
from cloudrt.model.network_config import VIEWS


@pytest.mark.parametrize("tta", VIEWS)
@pytest.mark.parametrize("presence", ["none", "head"])
def test_views_are_the_mean_logits_of_flipped_images(tmp_path: Path, tta: str, presence: str) -> None:
    """Compared with each view alone: flipped, run, flipped back; with a band without data."""
    checkpoint = make_checkpoint(tmp_path / "m.pth", presence=presence, subtract_no_data=True)
    graph = InferenceGraph(checkpoint.network(), checkpoint.config).eval()
    image = np.random.default_rng(0).integers(60, 256, (2, 3, 64, 96)).astype(np.float32)
    image[0, :, :, 30:41] = 0
    levels = torch.from_numpy(image)
    views = VIEWS[tta]
    with torch.inference_mode():
        probability, certain = graph.predict_probability(levels, views)
        alone = [graph.predict_probability(levels.flip(view) if view else levels) for view in views]
    logits = [torch.logit(one.flip(view) if view else one) for (one, _), view in zip(alone, views, strict=True)]
    wanted = torch.sigmoid(torch.stack(logits).mean(0))  # resizing is linear, so the mean may be taken after it
    torch.testing.assert_close(probability, wanted, rtol=0, atol=2e-6)
    assert (probability[0].amin(dim=(0, 1)) == 0).any() and probability[1].min() > 0
    if presence == "head":
        heads = torch.stack([head for _, head in alone if head is not None])
        torch.testing.assert_close(certain, torch.sigmoid(torch.logit(heads).mean(0)), rtol=0, atol=2e-6)
    else:
        assert certain is None


def test_no_map_of_the_submissions_size_is_flipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_checkpoint(tmp_path / "m.pth")
    graph = InferenceGraph(checkpoint.network(), checkpoint.config).eval()
    flipped: list[tuple[int, ...]] = []
    flip = torch.Tensor.flip

    def kept(self: torch.Tensor, *axes: Any) -> torch.Tensor:
        flipped.append(tuple(self.shape[2:]))
        return flip(self, *axes)

    monkeypatch.setattr(torch.Tensor, "flip", kept)
    with torch.inference_mode():
        graph.predict_probability(torch.zeros(1, 3, 64, 96), VIEWS["hv"])
    assert len(flipped) == 6
    assert set(flipped) == {(64, 96)}
