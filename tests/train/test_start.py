"""The initial weights of a run from a checkpoint, and the checks and time budget of several processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from cloudrt.train.cache import open_cache
from cloudrt.train.config import TrainConfig
from cloudrt.train.dataset import CloudDataset
from cloudrt.train.distributed import Processes, processes
from cloudrt.train.loop import train
from cloudrt.train.start import start
from cloudrt.train.trainer import Trainer
from support.networks import OPTIONS, make_checkpoint
from support.training import SMALL, train_arguments

from cloudrt.cli.train import train as command
from cloudrt.data.folder import open_data
from cloudrt.errors import ArtifactError, DataError
from cloudrt.labels import CLOUDS
from cloudrt.model.checkpoint import Checkpoint
from cloudrt.model.network_config import NetworkConfig

ONE_EPOCH = replace(SMALL, epochs=1, batch_size=3, accumulate=1)


def network_config(config: TrainConfig) -> NetworkConfig:
    return NetworkConfig("FPN", config.encoder, OPTIONS, config.input_size, presence=config.presence)


def test_a_run_starts_with_a_checkpoints_weights_statistics_and_licence(tmp_path: Path) -> None:
    """What the checkpoint lacks, here the classification head, starts from scratch."""
    path = tmp_path / "best.pth"
    made = make_checkpoint(path, seed=7, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0))
    replace(made, weights_license="as ImageNet's").save(path)
    given = Checkpoint.load(path).weights
    config = replace(ONE_EPOCH, init=str(path), presence="head")
    begun = start(config, CLOUDS)
    assert begun.license == "as ImageNet's"
    assert begun.config == replace(network_config(config), mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0))
    own = begun.network.state_dict()
    assert set(own) - set(given) == {"classification_head.3.weight", "classification_head.3.bias"}
    assert all(torch.equal(own[name], value) for name, value in given.items())


def test_unusable_weights_give_a_one_line_error(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "other.pth", encoder="tu-regnety_002")
    made = make_checkpoint(tmp_path / "nan.pth")
    made.weights["encoder.conv1.weight"][0, 0, 0, 0] = float("nan")
    made.save(tmp_path / "nan.pth")
    for name, error, said in (
        ("other.pth", DataError, r"other.pth has another encoder: use a checkpoint with the same"),
        ("gone.pth", ArtifactError, r"gone.pth is missing"),
        ("nan.pth", DataError, r"nan.pth: encoder.conv1.weight contains NaN"),
    ):
        with pytest.raises(error, match=said) as caught:
            start(replace(ONE_EPOCH, init=str(tmp_path / name)), CLOUDS)
        assert "\n" not in str(caught.value)


def test_the_command_takes_init(scenes: Path, cached: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "first.pth")
    frozen = ["--encoder-lr", "1e-9", "--decoder-lr", "1e-9", "--freeze-batchnorm"]
    words = train_arguments(scenes, tmp_path, cached, *frozen, "--validation-share", "0.25")
    done = CliRunner().invoke(command, [*words, "--init", str(tmp_path / "first.pth")])
    assert done.exit_code == 0, done.output
    ours, first = Checkpoint.load(tmp_path / "run/best.pth"), Checkpoint.load(tmp_path / "first.pth")
    assert ours.training["init"] == str(tmp_path / "first.pth")
    for name, value in first.weights.items():
        np.testing.assert_allclose(ours.weights[name], value, atol=1e-6)


def test_processes_end_together_when_the_time_of_the_first_is_up(scenes: Path, cached: Path) -> None:
    """Their clocks differ; one that continued alone would wait forever for the gradients of the others."""

    class Second(Processes):
        def broadcast(self, value: float) -> float:
            return 1000.0  # seconds of the first process

    config = replace(ONE_EPOCH, schedule="cosine", time_budget=900.0)
    network = start(config, CLOUDS).network
    cache = open_cache(open_data(scenes), config.input_size, cached)
    dataset = CloudDataset(cache, np.arange(12), network_config(config), "none", 0)
    trainer = Trainer(config, network, dataset, torch.device("cpu"), Second())
    trainer.epoch(1, lambda n, **fields: None)
    assert trainer.seconds == 1000.0 and trainer.out_of_time
    assert trainer.steps == 1


@pytest.mark.parametrize(("world", "rank"), [("x", "0"), ("2", "x"), ("2", "")])
def test_variables_of_torchrun_that_are_no_numbers_are_named(
    world: str, rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WORLD_SIZE", world), ("RANK", rank), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    named = f"found RANK={rank}, WORLD_SIZE={world}, LOCAL_RANK=0: start several processes with torchrun"
    with pytest.raises(DataError, match=named), processes("cpu"):
        pass


def test_processes_on_the_gpu_of_another_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(DataError, match="--device cuda:1 is one GPU, but each process needs its own"),
        processes("cuda:1"),
    ):
        pass


def test_more_processes_than_training_images_are_refused(
    scenes: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before an earlier run is removed."""

    class Many(Processes):
        def barrier(self) -> None: ...

    @contextmanager
    def many(_device: str) -> Iterator[Processes]:
        yield Many(world_size=1000)

    monkeypatch.setattr("cloudrt.train.loop.processes", many)
    (tmp_path / "best.pth").write_text("of an earlier run")
    with pytest.raises(DataError, match=r"\d+ training images are too few for 1000 processes: use fewer"):
        train(ONE_EPOCH, scenes, tmp_path, cached)
    assert (tmp_path / "best.pth").exists()
