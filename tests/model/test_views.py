"""Test-time augmentation: the mean of the logits over flips, which are flipped back before they are resized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from support.networks import make_checkpoint

from cloudrt.model.network import InferenceGraph
from cloudrt.model.network_config import VIEWS


def test_levels_are_those_of_opencvs_resize(tmp_path: Path) -> None:
    """The map of each class, enlarged by OpenCV, then transposed."""
    checkpoint = make_checkpoint(tmp_path / "m.pth", subtract_no_data=False)
    network, config = checkpoint.network(), checkpoint.config
    images = np.random.default_rng(1).integers(0, 256, (2, 64, 96, 3), np.uint8)
    normalised = (images.astype(np.float32) - np.array(config.mean, np.float32)) / np.array(config.std, np.float32)
    with torch.inference_mode():
        levels = InferenceGraph(network, config).eval()(torch.from_numpy(images))
        logits = network(torch.from_numpy(normalised.transpose(0, 3, 1, 2).copy())).numpy()
    height, width = config.labels.submit_grid
    assert isinstance(levels, torch.Tensor) and levels.shape == (2, 4, width, height) and levels.dtype == torch.uint8
    for found, maps in zip(levels.numpy(), logits, strict=True):
        for one, logit in zip(found, maps, strict=True):
            large = cv2.resize(logit, (width, height), interpolation=cv2.INTER_LINEAR)
            assert np.abs(one.T - 255 / (1 + np.exp(-large))).max() <= 1


@pytest.mark.parametrize("tta", VIEWS)
@pytest.mark.parametrize("presence", ["none", "head"])
def test_views_are_the_mean_logits_of_flipped_images(tmp_path: Path, tta: str, presence: str) -> None:
    """Compared with each view alone, which is flipped, run and flipped back; the first image has a band of no data."""
    checkpoint = make_checkpoint(tmp_path / "m.pth", presence=presence, subtract_no_data=True)
    graph = InferenceGraph(checkpoint.network(), checkpoint.config).eval()
    image = np.random.default_rng(0).integers(60, 256, (2, 3, 64, 96)).astype(np.float32)
    image[0, :, :, 30:41] = 0
    levels = torch.from_numpy(image)
    views = VIEWS[tta]
    with torch.inference_mode():
        probability, certain = graph.predict_probability(levels, views)
        alone = [graph.predict_probability(levels.flip(view) if view else levels) for view in views]
    turned = [tuple(5 - axis for axis in view) for view in views]  # of the transposed maps
    logits = [torch.logit(one.flip(view) if view else one) for (one, _), view in zip(alone, turned, strict=True)]
    wanted = torch.sigmoid(torch.stack(logits).mean(0))  # resizing is linear, so the mean may be taken after it
    torch.testing.assert_close(probability, wanted, rtol=0, atol=2e-6)
    assert (probability[0].amin(dim=(0, 1)) == 0).any() and probability[1].min() > 0
    if presence == "head":
        heads = torch.stack([head for _, head in alone if head is not None])
        torch.testing.assert_close(certain, torch.sigmoid(torch.logit(heads).mean(0)), rtol=0, atol=2e-6)
    else:
        assert certain is None


def test_maps_are_flipped_back_before_they_are_resized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
