"""Losses: formulas, weighted sums, means over the classes that are present, and options without effect."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from cloudrt.train.dataset import CloudDataset, Feed
from cloudrt.train.distributed import processes
from cloudrt.train.losses import build_loss, parse_loss
from cloudrt.train.trainer import Trainer
from support.training import SMALL, TOGETHER, toy_cache

from cloudrt.errors import DataError
from cloudrt.model.network import build_network
from cloudrt.model.network_config import NetworkConfig


@pytest.mark.parametrize("name", ["bce+dice", "bce", "dice", "focal", "iou", "lovasz", "0.5*iou+dice+2*focal"])
def test_losses_prefer_the_truth(name: str) -> None:
    truth = (torch.rand(2, 4, 32, 32, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    loss = build_loss(name)
    assert loss((truth - 0.5) * 8, truth) < loss((0.5 - truth) * 8, truth)


def test_bce_dice_is_the_sum_of_its_parts() -> None:
    """Compared with the formulas; Dice (Milletari et al., V-Net, 2016) over each class of the batch."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 4, 16, 16, generator=generator)
    truth = (torch.rand(2, 4, 16, 16, generator=generator) > 0.5).float()
    p = logits.double().sigmoid()
    bce = -(truth * p.log() + (1 - truth) * (1 - p).log()).mean()
    both = (p * truth).sum((0, 2, 3))
    dice = 1 - (2 * both / (p.sum((0, 2, 3)) + truth.sum((0, 2, 3)))).mean()
    assert build_loss("bce+dice")(logits, truth).item() == pytest.approx(float(bce + dice), abs=1e-5)


def test_sums_of_losses_are_parsed_and_weighted() -> None:
    assert parse_loss("0.5*iou + dice+2*focal") == [(0.5, "iou"), (1.0, "dice"), (2.0, "focal")]
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 4, 16, 16, generator=generator)
    truth = (torch.rand(3, 4, 16, 16, generator=generator) > 0.5).float()
    one = {name: float(build_loss(name)(logits, truth)) for name in ("iou", "dice", "focal")}
    assert float(build_loss("0.5*iou+dice+2*focal")(logits, truth)) == pytest.approx(
        0.5 * one["iou"] + one["dice"] + 2 * one["focal"]
    )
    apart = np.mean([float(build_loss("dice")(logits[i : i + 1], truth[i : i + 1])) for i in range(3)])
    assert float(build_loss("dice", "samples")(logits, truth)) == pytest.approx(apart)
    for wrong in ("", "dice+", "x*dice", "-1*dice", "0*dice", "nan*dice", "dice*2"):
        with pytest.raises(DataError):
            parse_loss(wrong)
    with pytest.raises(DataError, match=r"dyce.*dice"):
        parse_loss("bce+dyce")


@pytest.mark.parametrize("over", ["batch", "samples"])
@pytest.mark.parametrize("name", ["dice", "iou", "lovasz"])
def test_masks_present_averages_over_the_pairs_that_have_the_class(name: str, over: str) -> None:
    """Compared with the losses, and gradients, of single pairs of image and class."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 4, 12, 20, generator=generator).requires_grad_()
    truth = (torch.rand(3, 4, 12, 20, generator=generator) > 0.6).float()
    present = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    truth[~present] = 0
    one = build_loss(name)
    each = [
        [one(logits[i : i + 1, c : c + 1], truth[i : i + 1, c : c + 1]) for c in range(4) if present[i, c]]
        for i in range(3)
    ]
    pairs = [pair for image in each for pair in image]
    images = [torch.stack(image).mean() if image else torch.zeros(()) for image in each]
    wanted = torch.stack(images if over == "samples" else pairs).mean()
    found = build_loss(name, over, "present")(logits, truth)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    (ours,) = torch.autograd.grad(found, logits)
    (theirs,) = torch.autograd.grad(wanted, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)
    assert float(build_loss(name, over, "present")(logits, torch.zeros_like(truth)).detach()) == 0.0


@pytest.mark.parametrize("name", ["bce", "focal"])
def test_masks_present_leaves_losses_of_pixels_as_they_are(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 4, 12, 20, generator=generator)
    truth = torch.zeros_like(logits)
    assert torch.equal(build_loss(name, "batch", "present")(logits, truth), build_loss(name)(logits, truth))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_head_learns_from_all_images_and_the_masks_from_those_with_the_class(smoothing: float) -> None:
    """The loss of one batch, compared with the formulas on the output of an equal network."""
    config = replace(
        TOGETHER,
        presence="head",
        presence_weight=0.7,
        label_smoothing=smoothing,
        loss="dice",
        loss_over="batch",
        masks="present",
        augment="none",
        batch_size=6,
        accumulate=1,
        epochs=1,
    )
    classes = np.random.default_rng(4).random((6, 4)) < 0.4
    shape = NetworkConfig("FPN", "resnet18", config.options, config.input_size, presence="head")
    images = np.random.default_rng(5).integers(0, 256, (6, *config.input_size, 3), np.uint8)
    dataset = CloudDataset(toy_cache(classes, images), np.arange(6), shape, "none", 0)
    torch.manual_seed(6)
    network = build_network(shape)
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    samples = [dataset[index] for index in range(6)]
    image, mask = (torch.stack([sample[part] for sample in samples]) for part in (0, 1))
    pixels, truth = Feed(shape, torch.device("cpu"))(image, mask)
    with torch.inference_mode():
        logits, head = copy.deepcopy(network).eval()(pixels)
    p, t = logits.double().sigmoid().numpy(), truth.double().numpy()
    q = head.double().sigmoid().numpy()
    overlap = 2 * (p * t).sum((2, 3)) / (p.sum((2, 3)) + t.sum((2, 3)))
    target = np.where(classes, 1 - smoothing / 2, smoothing / 2)
    cross = -(target * np.log(q) + (1 - target) * np.log(1 - q)).mean()
    with processes("cpu") as group:
        trainer = Trainer(config, network, dataset, torch.device("cpu"), group)
        found = trainer.epoch(1, lambda *_, **__: None)
    assert 0 < classes.sum() < classes.size
    assert found == pytest.approx((1 - overlap[classes]).mean() + 0.7 * cross, rel=1e-4)


def test_options_without_effect_are_refused() -> None:
    with pytest.raises(DataError, match="masks=present needs one of the losses dice, iou, lovasz, found 'bce'"):
        replace(SMALL, masks="present", loss="bce")
    with pytest.raises(DataError, match="label_smoothing applies to the classification head"):
        replace(SMALL, label_smoothing=0.1)
    for wrong in (-0.1, 1.0):
        with pytest.raises(DataError, match="label_smoothing must be at least 0"):
            replace(SMALL, label_smoothing=wrong, presence="head")
