"""Training options that the notebook lacks, compared with plain references; --resume, and the command's messages."""

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
from cloudrt.train.cache import open_cache
from cloudrt.train.cross import CrossResult
from cloudrt.train.dataset import EpochBatches
from cloudrt.train.epochs import TrainResult
from cloudrt.train.loop import _warn_of_absent_classes, train
from cloudrt.train.losses import build_loss
from cloudrt.train.optimise import build_average, rate_factor, seed_all
from cloudrt.train.trainer import Trainer
from cloudrt.train.validate import Validator
from support.training import SMALL, TOGETHER, interrupt_after, weights

from cloudrt.cli.train import train as command
from cloudrt.data.folder import open_data
from cloudrt.errors import DataError
from cloudrt.model.checkpoint import Checkpoint, read_tensors, write_tensors
from cloudrt.model.network import build_network
from cloudrt.search.choose import choose_rules
from cloudrt.search.probabilities import Probabilities, labelled_maps
from cloudrt.search.tables import THRESHOLDS, measure, min_areas_for

RICH = replace(
    SMALL, epochs=3, schedule="one-cycle", ema=0.9, presence="head", loss="0.5*iou+bce", tta="h", optimizer="adamw"
)
"""Options whose state --resume must restore; the head's dropout uses the random generator."""


def history(folder: Path) -> list[dict[str, str]]:
    """The rows of history.csv, without times and memory."""
    rows = csv.DictReader((folder / "history.csv").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "memory_mb")} for row in rows]


@pytest.fixture(scope="module")
def rich(scenes: Path, cached: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "rich"
    train(RICH, scenes, folder, cached)
    return folder


def test_a_run_that_was_cut_short_ends_with_the_same_weights(
    rich: Path, scenes: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of an epoch, then resumed."""
    real = Trainer._batch

    def batch(self: Trainer, image: Any, target: Any, position: int, last: bool) -> torch.Tensor:
        if self.batches.epoch == 2 and position == 2:
            raise KeyboardInterrupt
        return real(self, image, target, position, last)

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


def test_a_damaged_state_gives_a_one_line_error(scenes: Path, cached: Path, tmp_path: Path) -> None:
    (tmp_path / "state.pth").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"state\.pth is damaged: use --overwrite"):
        train(SMALL, scenes, tmp_path, cached, resume=True)


def test_a_state_that_does_not_fit_gives_a_one_line_error(
    scenes: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            train(SMALL, scenes, tmp_path, cached)
    state = read_tensors(tmp_path / "state.pth")
    trainer = state["trainer"]
    network, optimizer = trainer["network"], trainer["optimizer"]
    first = next(iter(network))
    groups, entries = optimizer["param_groups"], optimizer["state"]
    averages: list[Any] = [
        entries[0] | {"exp_avg": 0.5},
        entries[0] | {"exp_avg": torch.zeros(3)},
        {"step": entries[0]["step"], "momentum_buffer": entries[0]["exp_avg"]},
        {"step": entries[0]["step"]},
        3,
    ]
    others: list[Any] = [
        {key: value for key, value in trainer.items() if key != "scaler"},
        trainer | {"network": {key: value for key, value in network.items() if key != first}},
        trainer | {"network": network | {first: torch.zeros(3)}},
        trainer | {"network": []},
        trainer | {"optimizer": optimizer | {"param_groups": []}},
        trainer | {"optimizer": ()},
        trainer | {"optimizer": optimizer | {"param_groups": [group | {"lr": "0.1"} for group in groups]}},
        *(trainer | {"optimizer": optimizer | {"state": entries | {0: wrong}}} for wrong in averages),
        trainer | {"schedule": trainer["schedule"] | {"best": "0.1"}},
        trainer | {"steps": "two"},
        trainer | {"seconds": None},
        [],
    ]
    for wrong in others:
        write_tensors(tmp_path / "state.pth", state | {"trainer": wrong})
        with pytest.raises(DataError, match=r"state\.pth does not fit this training: use --overwrite"):
            train(SMALL, scenes, tmp_path, cached, resume=True)
    change: dict[str, Any]
    for change in ({"epoch": "1"}, {"best_dice": None}, {"license": 3}, {"history": {}}, {"history": [1.0]}):
        write_tensors(tmp_path / "state.pth", state | change)
        with pytest.raises(DataError, match=r"state\.pth is damaged, or from another version of cloudrt"):
            train(SMALL, scenes, tmp_path, cached, resume=True)


def test_two_processes_train_what_one_does_with_twice_the_batch(scenes: Path, cached: Path, tmp_path: Path) -> None:
    """With torchrun and gloo; BatchNorm is frozen, the loss is a mean over images, and nothing is dropped out."""
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
    seed_all(TOGETHER.seed)
    begun = build_network(Checkpoint.load(tmp_path / "one" / "last.pth").config).state_dict()
    moved = 0.0
    for name, value in one.items():
        assert torch.allclose(two[name].float(), value.float(), atol=1e-6, rtol=0), name
        if value.is_floating_point():
            moved = max(moved, float((value - begun[name]).abs().max()))
    assert moved > 1e-3  # the weights changed by much more


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


def test_the_average_of_the_weights_follows_the_formula() -> None:
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


def test_one_cycle_matches_torch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    # PyTorch's rate is highest at step `pct_start * total_steps - 1`, here 30; ours at 0.3 * 100 steps.
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=101, pct_start=31 / 101, div_factor=25, final_div_factor=400
    )
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < 101:
            torchs.step()
    ours = [rate_factor(step / 100, 0.3) for step in range(101)]
    assert ours == pytest.approx(rates, rel=1e-9)
    cosine = [rate_factor(share, 0.03) for share in (0.03, 0.515, 1.0)]
    assert cosine == pytest.approx([1.0, 0.5, 1e-4], abs=1e-3)


def test_the_final_validation_with_flips_is_what_the_artifact_with_flips_gives(
    rich: Path, scenes: Path, cached: Path, tmp_path: Path
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
        maps = labelled_maps(kept, open_data(scenes))
        tables = measure(maps, 6, THRESHOLDS, min_areas_for(best.config.labels.submit_grid))
        tuned = [choice.out_of_fold for choice in choose_rules(tables)]
    plain = replace(validator, tta="none")
    final = validator.run(network, best.config, final=True)
    assert [one.dice for one in final.found] == tuned
    assert final != plain.run(network, best.config, final=True)
    assert validator.run(network, best.config) == plain.run(network, best.config)  # after an epoch


def test_the_head_is_stored(rich: Path) -> None:
    best = Checkpoint.load(rich / "best.pth")
    assert best.config.presence == "head"
    assert any(name.startswith("classification_head") for name in best.weights)
    assert best.training["presence_weight"] == 0.5


def test_a_run_that_exceeds_its_time_budget_ends_with_rules(scenes: Path, cached: Path, tmp_path: Path) -> None:
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


def test_a_class_that_no_held_out_image_has_is_reported(
    scenes: Path, cached: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = open_cache(open_data(scenes), (64, 96), cached)
    absent = replace(cache, truth=np.array(cache.truth) * np.array([1, 0, 1, 1], np.uint8)[None, :, None])
    _warn_of_absent_classes(absent, np.arange(8), ("Fish", "Flower", "Gravel", "Sugar"))
    assert "no held-out image contains Flower" in caplog.text


@pytest.mark.parametrize(("dice", "suggested"), [(0.7, True), (0.5, False), (0.4, False)])
@pytest.mark.parametrize("folds", [0, 2])
def test_the_summary_explains_the_score_and_suggests_export_only_if_useful(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dice: float, suggested: bool, folds: int
) -> None:
    result = TrainResult(tmp_path, dice, 3, 0.5, 10.0)
    monkeypatch.setattr("cloudrt.train.loop.train", lambda *_, **__: result)
    monkeypatch.setattr("cloudrt.train.cross.cross_validate", lambda *_, **__: CrossResult(dice, (dice, dice), 0.5))
    done = CliRunner().invoke(command, [str(scenes), "--runs", str(tmp_path), "--folds", str(folds)])
    assert done.exit_code == 0, done.output
    assert f"{dice:.4f}" in done.output and "all rows empty: 0.5000" in done.output
    assert ("Next: cloudrt-export" in done.output) is suggested
    assert ("no better than empty rows" in done.output) is not suggested
    assert folds or "scored with rules chosen on the others, as for new images" in done.output


def test_runs_are_numbered(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []

    def keep(_config: object, _data: Path, folder: Path, *_: object, **__: object) -> TrainResult:
        folder.mkdir(parents=True)
        folders.append(folder.name)
        return TrainResult(folder, 0.7, 1, 0.5, 1.0)

    monkeypatch.setattr("cloudrt.train.loop.train", keep)
    for _ in range(3):
        assert CliRunner().invoke(command, [str(scenes), "--runs", str(tmp_path)]).exit_code == 0
    assert folders == ["run-1", "run-2", "run-3"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--resume"], "--resume needs the --name"),
        (["--resume", "--overwrite", "--name", "a"], "exclude each other"),
        (["--fold", "1"], "--fold needs --folds"),
        (["--folds", "1"], "folds must be 0 or at least 2"),
        (["--folds", "3", "--fold", "3"], "folds must be 0 or at least 2"),
        (["--folds", "10000000"], "0<=x<=1000"),  # before a path is made for each
        (["--loss", "bce+dyce"], "dyce"),
        (["--ema", "1.5"], "ema must be at least 0"),
        (["--time-budget", "soon"], "is not a duration such as 90m"),
        (["--presence", "top-k", "--top-k", "0"], "top_k"),
        (["--encoder", "resnet19", "--name", "b"], "resnet18"),
    ],
)
def test_wrong_options_give_a_one_line_error(scenes: Path, tmp_path: Path, words: list[str], said: str) -> None:
    base = [str(scenes), "--runs", str(tmp_path), "--cache", str(tmp_path / "c"), "--input-size", "96x64"]
    result = CliRunner().invoke(command, [*base, "--encoder-weights", "none", "--epochs", "1", *words])
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert "Traceback" not in result.output


def test_memory_is_in_the_history(rich: Path) -> None:
    rows = csv.DictReader((rich / "history.csv").read_text().splitlines())
    assert min(float(row["memory_mb"]) for row in rows) > 0
