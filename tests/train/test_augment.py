"""Augmentations, and pre-training on brightness."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cloudrt.train.augment import build_augmentation
from cloudrt.train.cache import open_cache
from cloudrt.train.config import AUGMENTATIONS
from cloudrt.train.pretrain import brightness, hide, pretrain
from scipy import ndimage
from support.training import SMALL

from cloudrt.data.folder import open_data
from cloudrt.data.scenes import draw_scene
from cloudrt.model.network import build_network
from cloudrt.model.network_config import NetworkConfig


def test_brightness_matches_numpy() -> None:
    random = np.random.default_rng(3)
    image = random.normal(size=(2, 3, 40, 56)).astype(np.float32)
    found = brightness(torch.from_numpy(image), 4).numpy()
    assert found.shape == (2, 4, 40, 56)
    for number in range(2):
        grey = image[number].mean(axis=0)
        smooth = ndimage.uniform_filter(grey, 9, mode="constant")  # the mean divides by 81 at the borders too
        for index in range(4):
            cut = np.quantile(smooth, (index + 1) / 5)
            assert (found[number, index] != (smooth > cut)).mean() < 0.002


def test_about_half_of_the_blocks_are_hidden() -> None:
    hidden = hide(torch.ones(8, 3, 100, 160), torch.Generator().manual_seed(0))
    assert 0.35 < float((hidden == 0).float().mean()) < 0.65
    blocks = hidden[:, :, :96, :160].unfold(2, 32, 32).unfold(3, 32, 32)
    assert ((blocks.amax((4, 5)) - blocks.amin((4, 5))) == 0).all()


def test_pretraining_learns_brightness_and_resets_the_head(scenes: Path, cached: Path) -> None:
    from cloudrt.train.dataset import CloudDataset

    torch.manual_seed(0)
    config = replace(SMALL, pretrain_epochs=15, encoder_lr=3e-3, decoder_lr=3e-3, optimizer="adamw")
    network_config = NetworkConfig("FPN", "resnet18", SMALL.options, (64, 96))
    network = build_network(network_config)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    dataset = CloudDataset(open_cache(open_data(scenes), (64, 96), cached), np.arange(12), network_config, "flips", 1)
    losses: list[float] = []
    pretrain(network, dataset, config, torch.device("cpu"), lambda n, loss: losses.append(loss))
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    after = network.state_dict()
    for name, value in before.items():
        if name.startswith("segmentation_head"):
            assert torch.equal(after[name], value), name
    assert not torch.equal(after["encoder.conv1.weight"], before["encoder.conv1.weight"])


@pytest.mark.parametrize("preset", AUGMENTATIONS)
def test_augmented_masks_are_binary(preset: str) -> None:
    scene = draw_scene(0, (96, 128)).image
    mask = np.zeros((96, 128, 4), np.uint8)
    mask[20:60, 30:90] = 1
    transform = build_augmentation(preset)
    assert (transform is None) == (preset == "none")
    if transform is None:
        return
    seen = set()
    for seed in range(12):
        transform.set_random_seed(seed)
        changed = transform(image=scene, mask=mask)
        assert changed["image"].shape == scene.shape and changed["image"].dtype == np.uint8
        assert set(np.unique(changed["mask"])) <= {0, 1}
        seen.add(changed["image"].tobytes())
    assert len(seen) > 1
