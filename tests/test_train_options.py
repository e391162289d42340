"""What training can do beyond the notebook: each option against a plain reference of its own."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from cloudrt.export.ensemble import Ensemble
from cloudrt.train import loop
from cloudrt.train.augment import build_augmentation
from cloudrt.train.cache import DatasetCache, open_cache
from cloudrt.train.config import AUGMENTATIONS, TrainConfig
from cloudrt.train.cross import cross_validate
from cloudrt.train.dataset import EpochBatches
from cloudrt.train.folds import difference_hash, folds, similar_groups
from cloudrt.train.loop import train
from cloudrt.train.losses import build_loss, parse_loss
from cloudrt.train.optimise import build_average, rate_factor
from cloudrt.train.pretrain import brightness, hide, pretrain
from cloudrt.train.trainer import Trainer
from cloudrt.train.validate import Validator
from numpy.typing import NDArray
from scipy import ndimage
from test_train import SMALL

from cloudrt.choose import choose_rules
from cloudrt.cli.train import train as command
from cloudrt.data import open_data
from cloudrt.errors import DataError
from cloudrt.network import Checkpoint, NetworkConfig, build_network
from cloudrt.probabilities import Probabilities
from cloudrt.scenes import draw_scene
from cloudrt.search import LabelledMaps, measure, min_areas_for, pack_mask

RICH = replace(
    SMALL, epochs=3, schedule="one-cycle", ema=0.9, presence="head", loss="0.5*iou+bce", tta="h", optimizer="adamw"
)
"""Everything that has a state: the head's dropout draws from the generator."""


def history(folder: Path) -> list[dict[str, str]]:
    """The rows of history.csv, but for what a clock and the system measure."""
    rows = csv.DictReader((folder / "history.csv").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "memory_mb")} for row in rows]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return Checkpoint.load(path).weights


@pytest.fixture(scope="module")
def rich(scenes: Path, cached: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "rich"
    train(RICH, scenes, folder, cached)
    return folder


@pytest.mark.parametrize("stop", [1])
def test_a_run_that_was_cut_short_ends_with_the_same_weights(
    rich: Path,
    scenes: Path,
    cached: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: int,
) -> None:
    """Stopped in the middle of an epoch, then resumed."""
    real = Trainer._batch

    def batch(self: Trainer, image: Any, target: Any, epoch: int, position: int, last: bool) -> float:
        if epoch == stop + 1 and position == 2:
            raise KeyboardInterrupt
        return real(self, image, target, epoch, position, last)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_batch", batch)
        with pytest.raises(KeyboardInterrupt):
            train(RICH, scenes, tmp_path, cached)
    assert (tmp_path / "state.pth").exists()
    for change, named in (({"ema": 0.5}, "ema was 0.9, now 0.5"), ({"seed": 1}, "seed was 142, now 1")):
        with pytest.raises(DataError, match=named):
            train(replace(RICH, **change), scenes, tmp_path, cached, resume=True)
    result = train(RICH, scenes, tmp_path, cached, resume=True)
    assert not (tmp_path / "state.pth").exists()
    for name in ("best.pth", "last.pth"):
        ours, theirs = weights(tmp_path / name), weights(rich / name)
        for key, value in theirs.items():
            assert torch.equal(ours[key], value), (name, key)
    whole = Checkpoint.load(rich / "best.pth")
    assert (result.dice, Checkpoint.load(tmp_path / "best.pth").rules) == (whole.dice, whole.rules)
    assert history(tmp_path) == history(rich)
    with pytest.raises(DataError, match="is finished"):
        train(RICH, scenes, tmp_path, cached, resume=True)


def test_a_damaged_state_is_one_line(scenes: Path, cached: Path, tmp_path: Path) -> None:
    (tmp_path / "state.pth").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"state\.pth is damaged: --overwrite"):
        train(SMALL, scenes, tmp_path, cached, resume=True)


TOGETHER = replace(
    SMALL, epochs=2, batch_size=2, accumulate=2, schedule="constant", freeze_batchnorm=True, loss="bce+dice",
    loss_over="samples", augment="notebook", encoder_lr=2e-5, decoder_lr=2e-5, device="cpu",
)  # fmt: skip


def test_two_processes_train_what_one_does_with_twice_the_batch(
    scenes: Path,
    cached: Path,
    tmp_path: Path,
) -> None:
    """torchrun with gloo on this machine; BatchNorm frozen, the loss a mean over the images."""
    script = (
        "import json, sys\nfrom pathlib import Path\nimport torch\ntorch.set_num_threads(1)\n"
        "from cloudrt.train.config import TrainConfig\nfrom cloudrt.train.loop import train\n"
        "values = json.loads(sys.argv[1])\nvalues['input_size'] = tuple(values['input_size'])\n"
        "train(TrainConfig(**values), *map(Path, sys.argv[2:5]))\n"
    )
    (tmp_path / "run.py").write_text(script)
    words = [json.dumps(TOGETHER.to_dict()), str(scenes), str(tmp_path / "two"), str(cached)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, str(tmp_path / "run.py"), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    train(replace(TOGETHER, batch_size=4), scenes, tmp_path / "one", cached)
    two, one = weights(tmp_path / "two" / "last.pth"), weights(tmp_path / "one" / "last.pth")
    assert two.keys() == one.keys()
    begun = build_network(Checkpoint.load(tmp_path / "one" / "last.pth").config).state_dict()
    moved = 0.0
    for name, value in one.items():
        assert torch.allclose(two[name].float(), value.float(), atol=1e-5, rtol=0), name
        if value.is_floating_point():
            moved = max(moved, float((value - begun[name]).abs().max()))
    assert moved > 1e-4  # they did train


def test_processes_share_out_each_batch() -> None:
    for images, size, world in ((23, 3, 2), (40, 4, 2), (5, 4, 2)):
        ranks = [EpochBatches(images, size, 7, rank, world) for rank in range(world)]
        whole = EpochBatches(images, ranks[0].batch_size * world, 7)
        for epoch in (1, 2):
            for one in (*ranks, whole):
                one.epoch = epoch
            together = [[*one, *other] for one, other in zip(ranks[0], ranks[1], strict=True)]
            assert together == list(whole)
            seen = [image for batch in together for image in batch]
            assert len(set(seen)) == len(seen)
        assert len(list(whole)) == len(whole)


def toy_cache(classes: NDArray[np.bool_], images: NDArray[np.uint8] | None = None) -> DatasetCache:
    """A cache of (N, C) classes that are present."""
    mask = np.zeros((60, 90), np.uint8)
    mask[:9] = 1
    one, none = pack_mask(mask), pack_mask(np.zeros_like(mask))
    truth = np.array([[one if present else none for present in row] for row in classes])
    if images is None:
        images = np.random.default_rng(0).integers(0, 256, (len(classes), 16, 24, 3), np.uint8)
    return DatasetCache([f"{number}.jpg" for number in range(len(classes))], images, truth, {"3.jpg": "is empty"})


def test_folds_hold_every_image_once_and_the_classes_in_equal_parts() -> None:
    random = np.random.default_rng(1)
    classes = random.random((401, 4)) < (0.5, 0.4, 0.3, 0.1)
    cache = toy_cache(classes)
    parts = folds(cache, 5, 9)
    assert sorted(np.concatenate(parts)) == [number for number in range(401) if number != 3]
    shares = np.array([classes[part].mean(axis=0) for part in parts])
    assert np.abs(shares - classes.mean(axis=0)).max() < 0.03  # by lot it would be 0.05 and more
    assert max(map(len, parts)) - min(map(len, parts)) <= 6
    assert all((one == other).all() for one, other in zip(parts, folds(cache, 5, 9), strict=True))
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(parts, folds(cache, 5, 8), strict=True))
    with pytest.raises(DataError, match="500 folds need as many"):
        folds(cache, 500, 9)


def test_images_that_look_alike_stay_together() -> None:
    scenes_ = np.stack([draw_scene(seed, (64, 96)).image for seed in range(30)])
    twins = np.clip(scenes_.astype(int) + np.random.default_rng(0).integers(-6, 7, scenes_.shape), 0, 255)
    cache = toy_cache(np.ones((60, 3), bool), np.concatenate([scenes_, twins.astype(np.uint8)]))
    cache.failures.clear()
    groups = similar_groups(cache, np.arange(60))
    assert (groups[:30] == groups[30:]).all()
    assert len(set(groups)) > 20
    for part in folds(cache, 4, 0, group_similar=True):
        assert set(part % 30) == set(part[part < 30]) == set(part[part >= 30] - 30)
    flat = np.zeros((64, 90, 3), np.uint8)
    assert difference_hash(flat) == 0
    flat[:, 50:] = 200
    assert bin(difference_hash(flat)).count("1") == 8  # each row grows brighter once


def test_cross_validation_tunes_on_what_no_network_had_seen(
    scenes: Path,
    cached: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(SMALL, epochs=1, folds=3, presence="top-k", top_k=50)
    trained: list[int] = []
    real = loop.train

    def count(one: TrainConfig, *words: Any, **named: Any) -> Any:
        trained.append(one.fold)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return real(one, *words, **named)

    monkeypatch.setattr("cloudrt.train.cross.train", count)
    with pytest.raises(KeyboardInterrupt):
        cross_validate(config, scenes, tmp_path, cached)
    done = cross_validate(config, scenes, tmp_path, cached, resume=True)
    assert trained == [0, 1, 1, 2]  # the finished fold stayed
    data = open_data(scenes)
    table = data.read_train()
    held = [set((tmp_path / f"fold-{number}" / "held_out.txt").read_text().split()) for number in range(3)]
    assert set.union(*held) == set(table) and sum(map(len, held)) == len(table)
    with Probabilities(tmp_path / "oof.npz") as kept:
        assert sorted(kept.keys) == sorted(table)
        maps = []
        for key in kept.keys:
            levels, presence = kept.read(key)
            highest = np.sort(levels.reshape(4, -1), axis=1)[:, -50:].mean(axis=1)
            assert presence is not None and np.abs(presence - highest).max() <= 1
            maps.append(LabelledMaps(levels, data.truth_bits(key, table[key]), presence))
    choices = choose_rules(measure(iter(maps), len(maps), min_areas=min_areas_for(data.labels.submit_grid)))
    assert done.dice == pytest.approx(np.mean([choice.out_of_fold for choice in choices]))
    for number in range(3):
        best = Checkpoint.load(tmp_path / f"fold-{number}" / "best.pth")
        assert best.rules == tuple(choice.rule for choice in choices)
    assert json.loads((tmp_path / "folds.json").read_text())["dice"] == done.dice


def test_the_average_of_the_weights_is_the_formulas() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    average = build_average(network, 0.75)
    assert average is not None and build_average(network, 0.0) is None
    wanted: dict[str, torch.Tensor] = {}
    for step in range(4):
        with torch.no_grad():
            for value in network.state_dict().values():
                if value.is_floating_point():
                    value.add_(torch.randn(value.shape))
        average.update_parameters(network)
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                wanted[name] = value.clone() if step == 0 else 0.75 * wanted[name] + 0.25 * value
    for name, value in wanted.items():
        assert torch.allclose(average.module.state_dict()[name], value, atol=1e-6), name


def test_one_cycle_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    torchs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=101, div_factor=25, final_div_factor=400)
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < 101:
            torchs.step()
    # torch rises until step 29.3 of 100, ours until 30 of 100.
    ours = [rate_factor(step / 100, 0.3) for step in range(101)]
    assert np.abs(np.array(ours) - rates).max() < 0.04
    assert ours[0] == pytest.approx(1 / 25) and ours[-1] == pytest.approx(1e-4)
    cosine = [rate_factor(share, 0.03) for share in (0.03, 0.515, 1.0)]
    assert cosine == pytest.approx([1.0, 0.5, 1e-4], abs=1e-3)


def test_validation_with_flips_is_what_the_artifact_with_flips_gives(
    rich: Path,
    scenes: Path,
    cached: Path,
    tmp_path: Path,
) -> None:
    best = Checkpoint.load(rich / "best.pth")
    cache = open_cache(open_data(scenes), (64, 96), cached)
    network = best.network()
    validator = Validator(
        build_loss("bce"), cache, np.arange(6), 3, torch.device("cpu"), torch.inference_mode, "hv", tmp_path
    )
    validator.run(network, best.config, keep=tmp_path / "kept.npz")
    graph = Ensemble((best,), ("a",), "hv").graph()
    with torch.inference_mode(), Probabilities(tmp_path / "kept.npz") as kept:
        for position in range(6):
            levels, presence = graph(torch.from_numpy(np.array(cache.images[position])[None]))
            ours, said = kept.read(cache.names[position])
            assert np.abs(ours.astype(int) - levels[0].numpy()).max() <= 1
            assert said is not None and np.abs(said.astype(int) - presence[0].numpy()).max() <= 1


def test_the_head_is_stored_and_its_rules_are_searched(rich: Path) -> None:
    best = Checkpoint.load(rich / "best.pth")
    assert best.config.presence == "head"
    assert any(name.startswith("classification_head") for name in best.weights)
    assert best.training["presence_weight"] == 0.5


def test_brightness_is_numpys() -> None:
    random = np.random.default_rng(3)
    image = random.normal(size=(2, 3, 40, 56)).astype(np.float32)
    found = brightness(torch.from_numpy(image), 4).numpy()
    assert found.shape == (2, 4, 40, 56)
    for number in range(2):
        grey = image[number].mean(axis=0)
        count = ndimage.uniform_filter(np.ones_like(grey), 9, mode="constant")
        smooth = ndimage.uniform_filter(grey, 9, mode="constant")
        assert count.max() == pytest.approx(1)  # the mean divides by 81 at the borders too
        for index in range(4):
            cut = np.quantile(smooth, (index + 1) / 5)
            assert (found[number, index] != (smooth > cut)).mean() < 0.002


def test_about_half_of_the_blocks_are_hidden() -> None:
    hidden = hide(torch.ones(8, 3, 100, 160), torch.Generator().manual_seed(0))
    assert 0.35 < float((hidden == 0).float().mean()) < 0.65
    blocks = hidden[:, :, :96, :160].unfold(2, 32, 32).unfold(3, 32, 32)
    assert ((blocks.amax((4, 5)) - blocks.amin((4, 5))) == 0).all()


def test_pretraining_learns_brightness_and_leaves_a_new_head(scenes: Path, cached: Path) -> None:
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


def test_time_that_is_up_ends_a_run_with_its_rules(scenes: Path, cached: Path, tmp_path: Path) -> None:
    result = train(replace(SMALL, epochs=50, schedule="cosine", time_budget=1e-6), scenes, tmp_path, cached)
    assert len(history(tmp_path)) == 1
    assert len(Checkpoint.load(tmp_path / "best.pth").rules) == 4
    assert result.epoch == 1


def test_tensorboard_reads_the_history(scenes: Path, cached: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(replace(SMALL, tensorboard=True), scenes, tmp_path, cached)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = history(tmp_path)
    assert [one.value for one in events.Scalars("dice")] == pytest.approx([float(row["dice"]) for row in rows])
    assert "memory_mb" in events.Tags()["scalars"]


@pytest.mark.parametrize("preset", AUGMENTATIONS)
def test_presets_keep_masks_masks(preset: str) -> None:
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


def test_sums_of_losses_are_parsed_and_weighed() -> None:
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


def test_a_class_that_no_held_out_image_has_is_said(
    scenes: Path,
    cached: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = open_cache(open_data(scenes), (64, 96), cached)
    absent = replace(cache, truth=np.array(cache.truth) * np.array([1, 0, 1, 1], np.uint8)[None, :, None])
    loop._warn_of_absent_classes(absent, np.arange(8), ("Fish", "Flower", "Gravel", "Sugar"))
    assert "no held-out image has Flower" in caplog.text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--resume"], "give its --name"),
        (["--resume", "--overwrite", "--name", "a"], "give one of them"),
        (["--fold", "1"], "--fold is one of --folds"),
        (["--folds", "1"], "two folds or more"),
        (["--folds", "3", "--fold", "3"], "two folds or more"),
        (["--loss", "bce+dyce"], "dyce"),
        (["--ema", "1.5"], "ema is a decay"),
        (["--time-budget", "soon"], "no time such as 90m"),
        (["--presence", "head", "--top-k", "0"], "top_k"),
        (["--encoder", "resnet19", "--name", "b"], "resnet18"),
    ],
)
def test_wrong_options_are_one_line(scenes: Path, tmp_path: Path, words: list[str], said: str) -> None:
    base = [str(scenes), "--runs", str(tmp_path), "--cache", str(tmp_path / "c"), "--encoder-weights", "none"]
    result = CliRunner().invoke(command, [*base, "--input-size", "96x64", *words])
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert "Traceback" not in result.output


def test_memory_is_in_the_history(rich: Path) -> None:
    rows = csv.DictReader((rich / "history.csv").read_text().splitlines())
    assert min(float(row["memory_mb"]) for row in rows) > 0
