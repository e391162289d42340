"""Training: the samples, the loop, its files and checkpoints; the same seed gives the same run."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cloudrt.train.cache import open_cache
from cloudrt.train.config import default_input_size
from cloudrt.train.dataset import CloudDataset, Feed
from cloudrt.train.loop import train
from cloudrt.train.losses import build_loss
from cloudrt.train.optimise import Schedule, build_optimizer
from support.pictures import imread
from support.training import SMALL

from cloudrt.data.folder import open_data
from cloudrt.errors import DataError
from cloudrt.images.image import load_image
from cloudrt.labels import CLOUDS, Labels
from cloudrt.masks.rle import unpack_mask
from cloudrt.model.checkpoint import Checkpoint
from cloudrt.model.network import InferenceGraph, build_network
from cloudrt.model.network_config import NetworkConfig
from cloudrt.search.choose import choose_rules
from cloudrt.search.tables import LabelledMaps, measure, min_areas_for

NOTEBOOK_ENCODERS = (
    "resnet50",
    "resnet101",
    "efficientnet-b2",
    "efficientnet-b7",
    "densenet121",
    "se_resnext101_32x4d",
)


@pytest.fixture(scope="module")
def run(scenes: Path, cached: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    train(SMALL, scenes, folder, cached)
    return folder


def test_run_writes_its_files(run: Path) -> None:
    assert {path.name for path in run.iterdir() if not path.name.startswith(".")} == {
        "best.pth",
        "last.pth",
        "config.json",
        "held_out.txt",
        "history.csv",
        "curves.png",
    }
    config = json.loads((run / "config.json").read_text())
    assert config["encoder"] == "resnet18"
    assert config["network"]["input_size"] == [64, 96]
    rows = list(csv.DictReader((run / "history.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1.0", "2.0"]
    assert {"train_loss", "valid_loss", "dice", "dice_Fish", "dice_Sugar", "all_empty"} <= set(rows[0])
    assert imread(run / "curves.png").shape[1] > 1000


def test_checkpoints_load_with_weights_only(run: Path) -> None:
    for name in ("best.pth", "last.pth"):
        values = torch.load(run / name, weights_only=True)
        assert values["config"]["encoder"] == "resnet18"
    best = Checkpoint.load(run / "best.pth")
    assert len(best.rules) == 4
    assert best.training["seed"] == SMALL.seed
    assert 0 <= best.dice <= 1


def test_best_epoch_is_the_highest_dice(run: Path) -> None:
    best = Checkpoint.load(run / "best.pth")
    dices = [row["dice"] for row in best.history]
    assert best.epoch == 1 + int(np.argmax(dices))


def test_rules_and_dice_are_those_of_the_stored_weights_out_of_fold(run: Path, scenes: Path) -> None:
    best = Checkpoint.load(run / "best.pth")
    data = open_data(scenes)
    table = data.read_train()
    names = (run / "held_out.txt").read_text().splitlines()
    graph = InferenceGraph(best.network().to(memory_format=torch.channels_last), best.config).eval()
    images = np.stack([load_image(scenes / "train_images" / name, best.config.input_size) for name in names])
    with torch.inference_mode():  # one batch in channels last, as in training, so that levels are rounded alike
        levels = graph(torch.from_numpy(images)).numpy()
    maps = [LabelledMaps(one, data.truth_bits(name, table[name])) for name, one in zip(names, levels, strict=True)]
    choices = choose_rules(measure(iter(maps), len(maps), min_areas=min_areas_for(best.config.labels.submit_grid)))
    assert best.rules == tuple(choice.rule for choice in choices)
    assert best.dice == pytest.approx(np.mean([choice.out_of_fold for choice in choices]))


def test_held_out_images_are_listed_for_tuning(run: Path, scenes: Path) -> None:
    names = (run / "held_out.txt").read_text().splitlines()
    known = list(open_data(scenes).read_train())
    assert len(names) == len(set(names)) == round(SMALL.validation_share * len(known))
    assert set(names) < set(known)


def test_same_seed_same_run(run: Path, scenes: Path, cached: Path, tmp_path: Path) -> None:
    train(SMALL, scenes, tmp_path / "again", cached)
    first, again = Checkpoint.load(run / "last.pth"), Checkpoint.load(tmp_path / "again" / "last.pth")
    for name, value in first.weights.items():
        assert torch.equal(value, again.weights[name]), name
    assert first.rules == again.rules


def test_workers_do_not_change_the_samples(scenes: Path, cached: Path) -> None:
    cache = open_cache(open_data(scenes), (64, 96), cached)
    config = NetworkConfig(input_size=(64, 96))
    dataset = CloudDataset(cache, np.arange(4), config, augment="notebook", seed=1)
    here = [dataset[i] for i in range(4)]
    loader = torch.utils.data.DataLoader(dataset, batch_size=1, num_workers=1)
    for (image, mask), (other_image, other_mask) in zip(here, loader, strict=True):
        assert torch.equal(image, other_image[0])
        assert torch.equal(mask, other_mask[0])


def test_epochs_augment_differently(scenes: Path, cached: Path) -> None:
    cache = open_cache(open_data(scenes), (64, 96), cached)
    dataset = CloudDataset(cache, np.arange(12), NetworkConfig(input_size=(64, 96)), augment="notebook", seed=1)
    first = torch.stack([dataset[i][0] for i in range(12)])
    dataset.epoch = 1
    assert not torch.equal(first, torch.stack([dataset[i][0] for i in range(12)]))


def test_augmentation_moves_image_and_mask_together(scenes: Path, cached: Path) -> None:
    """The image is painted from the mask, so that both must remain equal."""
    cache = open_cache(open_data(scenes), (64, 96), cached)
    config = NetworkConfig(input_size=(64, 96), mean=(0, 0, 0), std=(255, 255, 255))
    plain = CloudDataset(cache, np.arange(8), config, augment="none", seed=1)
    painted = np.stack([plain[i][1].numpy()[:3].transpose(1, 2, 0) * 255 for i in range(8)])
    dataset = CloudDataset(replace(cache, images=painted), np.arange(8), config, augment="notebook", seed=1)
    for epoch in range(4):
        dataset.epoch = epoch
        for i in range(8):
            image, mask = dataset[i]
            different = (image.permute(2, 0, 1) > 127) != (mask[:3] > 0)
            assert different.float().mean() < 0.04  # edges are interpolated in the image


def test_the_input_of_the_network_equals_albumentations_normalisation(scenes: Path, cached: Path) -> None:
    import albumentations

    cache = open_cache(open_data(scenes), (64, 96), cached)
    config = NetworkConfig(input_size=(64, 96))
    dataset = CloudDataset(cache, np.arange(12), config, augment="none", seed=1)
    loader = torch.utils.data.DataLoader(dataset, batch_size=12)
    pixels, truth = Feed(config, torch.device("cpu"))(*next(iter(loader)))
    normalise = albumentations.Normalize(np.array(config.mean) / 255, np.array(config.std) / 255)
    resize = albumentations.Resize(64, 96)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    for number in range(12):
        wanted = normalise(image=np.array(cache.images[number]))["image"].transpose(2, 0, 1)
        np.testing.assert_allclose(pixels[number], wanted, atol=1e-5)
        planes = [unpack_mask(bits, (350, 525)) for bits in cache.truth[number]]
        small = resize(image=np.zeros((350, 525, 3), np.uint8), mask=np.stack(planes, axis=2))["mask"]
        np.testing.assert_array_equal(truth[number].numpy(), small.transpose(2, 0, 1))


def test_damaged_and_missing_images_are_left_out_by_name(
    scenes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = shutil.copytree(scenes, tmp_path / "data")
    damaged, missing = sorted((data / "train_images").iterdir())[:2]
    damaged.write_bytes(damaged.read_bytes()[:-500])
    missing.unlink()
    with caplog.at_level("INFO", "cloudrt"):
        result = train(replace(SMALL, epochs=1), data, tmp_path / "run", tmp_path / "cache")
    assert damaged.name in caplog.text
    assert missing.name in caplog.text
    assert (result.folder / "best.pth").is_file()


class NanLoss(torch.nn.Module):
    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return logits.sum() * float("nan")


def test_a_loss_that_is_nan_stops_the_run(scenes: Path, cached: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cloudrt.train.trainer.build_loss", lambda *_: NanLoss())
        with pytest.raises(DataError, match=r"loss is nan at epoch 1, batch 1 \(.*\.jpg.* more\): lower the"):
            train(replace(SMALL, epochs=1), scenes, tmp_path / "run", cached)


@pytest.mark.parametrize("encoder", NOTEBOOK_ENCODERS)
def test_notebook_encoders_give_logits_and_gradients(encoder: str) -> None:
    config = NetworkConfig("FPN", encoder, {}, (64, 64))
    network = build_network(config)
    logits = network(torch.zeros(2, 3, 64, 64))
    assert logits.shape == (2, 4, 64, 64)
    build_loss("bce+dice")(logits, torch.zeros_like(logits)).backward()
    assert next(network.parameters()).grad is not None


def test_bad_configurations() -> None:
    for change in ({"epochs": 0}, {"loss": "no"}, {"encoder_lr": 0.0}, {"validation_share": 1.0}, {"workers": -1}):
        with pytest.raises(DataError):
            replace(SMALL, **change)


@pytest.mark.parametrize(
    ("grid", "size"),
    [
        (CLOUDS.label_grid, (320, 640)),
        ((256, 1600), (192, 1120)),
        ((1024, 1024), (448, 448)),
        ((101, 101), (96, 96)),
        ((20, 30), (32, 32)),
    ],
)
def test_the_input_size_follows_the_data(grid: tuple[int, int], size: tuple[int, int]) -> None:
    assert default_input_size(Labels(("a",), grid, grid)) == size


def test_mixed_precision_on_a_cpu(scenes: Path, cached: Path, tmp_path: Path) -> None:
    result = train(replace(SMALL, epochs=1, precision="bf16", schedule="one-cycle"), scenes, tmp_path / "run", cached)
    weights = Checkpoint.load(result.folder / "best.pth").weights
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}
    with pytest.raises(DataError, match="fp16 needs a GPU"):
        train(replace(SMALL, precision="fp16", device="cpu"), scenes, tmp_path / "no", cached)


def test_encoder_and_decoder_have_their_own_learning_rates() -> None:
    network = build_network(NetworkConfig("FPN", "resnet18", SMALL.options, (64, 96)))
    optimizer = build_optimizer(network, replace(SMALL, encoder_lr=1e-4, decoder_lr=1e-2))
    assert type(optimizer).__name__ == "RAdam"
    encoder, decoder = optimizer.param_groups
    assert (encoder["lr"], decoder["lr"]) == (1e-4, 1e-2)
    ours = {id(p) for name, p in network.named_parameters() if name.startswith("encoder.")}
    assert {id(p) for p in encoder["params"]} == ours
    assert len(encoder["params"]) + len(decoder["params"]) == len(list(network.parameters()))
    plateau = Schedule(optimizer, replace(SMALL, schedule="plateau"))
    for _ in range(7):  # the first sets the best loss, five are the patience, the last lowers the rate
        plateau.report(1.0)
    assert encoder["lr"] == pytest.approx(0.3e-4)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_trains_on_cuda(scenes: Path, cached: Path, tmp_path: Path) -> None:
    result = train(replace(SMALL, device="cuda"), scenes, tmp_path / "run", cached)
    assert Checkpoint.load(result.folder / "best.pth").dice == pytest.approx(result.dice)
