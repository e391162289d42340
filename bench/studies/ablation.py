"""Effect of each training option: networks trained with one option changed, on folds of the training images.

    python -m cloudrt.bench.studies.ablation DATA -o FILE.json [--seeds 2] [--epochs 3] [--input-size 160 96]

Seed k holds out fold k, so the split, the weights and the order of samples all differ between seeds. Options that need
no separate training are evaluated with the `base` network. Every Dice is that of rules chosen out of fold, as in
`cloudrt tune`; the gain of an option is its Dice minus that of `base` with the same seed. FILE is written after each
run, and runs in it are not repeated.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from cloudrt.bench.machine import machine, versions
from cloudrt.train.cache import DatasetCache, open_cache
from cloudrt.train.config import TrainConfig
from cloudrt.train.dataset import CloudDataset
from cloudrt.train.distributed import Processes
from cloudrt.train.folds import folds
from cloudrt.train.optimise import find_device, seed_all
from cloudrt.train.pretrain import pretrain
from cloudrt.train.trainer import Trainer
from cloudrt.train.validate import Validator

from cloudrt.data.folder import open_data
from cloudrt.labels import Grid
from cloudrt.model.network import build_network
from cloudrt.model.network_config import NetworkConfig
from cloudrt.system.cache import cache_folder
from cloudrt.system.progress import progress_bar

logger = logging.getLogger(__name__)

FOLDS = 3
BASE = TrainConfig(
    encoder="tu-regnety_002",
    encoder_weights="none",
    batch_size=16,
    accumulate=1,
    encoder_lr=3e-3,
    decoder_lr=3e-3,
    schedule="cosine",
    ema=0.99,
    options={"decoder_pyramid_channels": 128, "decoder_segmentation_channels": 64},
)
"""Networks are evaluated with their last weights; "average of weights" evaluates the moving average of `base`."""
TRAINED: dict[str, Callable[[TrainConfig], TrainConfig]] = {
    "base": lambda config: config,
    "constant rates": lambda config: replace(config, schedule="constant"),
    "presence head": lambda config: replace(config, presence="head"),
    "brightness first": lambda config: replace(config, pretrain_epochs=1, epochs=config.epochs - 1),
}
"""Options with a separate training; all are trained on the same number of images, pre-training included."""


@dataclass(frozen=True)
class Outcome:
    """Dice of a run for each evaluation, and training speed."""

    dice: dict[str, float]
    images_per_second: float


def run(name: str, config: TrainConfig, cache: DatasetCache, network_config: NetworkConfig, scratch: Path) -> Outcome:
    """Train one network and evaluate it on the held-out fold."""
    device = find_device(config.device)
    seed_all(config.seed)
    network_config = replace(network_config, presence=config.presence)
    network = build_network(network_config).to(device).to(memory_format=torch.channels_last)
    parts = folds(cache, config.folds, 0)
    held_out = parts[config.fold]
    training = np.sort(np.concatenate([part for part in parts if part is not held_out]))
    dataset = CloudDataset(cache, training, network_config, config.augment, config.seed)
    if config.pretrain_epochs:
        pretrain(network, dataset, config, device, lambda n, **fields: None)
    trainer = Trainer(config, network, dataset, device, Processes())
    with progress_bar(f"Seed {config.seed}, {name}", config.epochs * trainer.images_per_epoch) as advance:
        for epoch in range(1, config.epochs + 1):
            trainer.epoch(epoch, advance)
    validator = Validator(trainer.loss, cache, held_out, config.batch_size, device, trainer.autocast, "none", scratch)

    def judge(validator: Validator, network: torch.nn.Module, **changes: Any) -> float:
        return float(validator.run(network, replace(network_config, **changes), final=True).dice)

    dice = {name: judge(validator, network)}
    if name == "base":
        dice["average of weights"] = judge(validator, trainer.eval_network)
        dice["flips"] = judge(replace(validator, tta="hv"), network)
        dice["top-k presence"] = judge(validator, network, presence="top-k")
        dice["no-data kept"] = judge(validator, network, subtract_no_data=False)
    return Outcome(dice, trainer.images / trainer.seconds)


def summarise(runs: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Return the gain of each option over `base`: mean, standard error over seeds, and gain of each seed.

    `runs` maps option -> seed -> Dice.
    """
    table: dict[str, dict[str, Any]] = {}
    for option, dices in runs.items():
        gains = [dice - runs["base"][seed] for seed, dice in dices.items() if seed in runs["base"]]
        table[option] = {
            "dice": round(float(np.mean(list(dices.values()))), 4),
            "gain": round(float(np.mean(gains)), 4),
            "standard_error": round(float(np.std(gains, ddof=1) / len(gains) ** 0.5), 4) if len(gains) > 1 else None,
            "gains": [round(gain, 4) for gain in gains],
        }
    return table


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--seeds", type=click.IntRange(1, FOLDS), default=2, show_default=True)
@click.option("--epochs", type=click.IntRange(2), default=3, show_default=True)
@click.option("--input-size", "size", nargs=2, type=int, default=(160, 96), show_default=True, help="Width and height.")
@click.option("--max-images", "limit", default=0, help="Use only the first N images; 0 uses all.")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder for decoded data sets.")
def main(data: Path, output: Path, seeds: int, epochs: int, size: Grid, limit: int, cache: Path | None) -> None:
    """Train every option with every seed and write the gains."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    source = open_data(data)
    input_size = size[::-1]
    images = open_cache(source, input_size, cache or cache_folder("datasets"), limit)
    base = replace(BASE, input_size=input_size, epochs=epochs, folds=FOLDS)
    network_config = NetworkConfig(
        base.architecture, base.encoder, dict(base.options), input_size, labels=source.labels
    )
    settings = {"images": len(images.names), "training": base.to_dict()}
    known = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    if known and known["settings"] != settings:
        raise click.ClickException(f"{output} has runs with other settings: give another file")
    runs: dict[str, dict[str, float]] = known.get("runs", {})
    for seed in range(seeds):
        for name, change in TRAINED.items():
            if str(seed) in runs.get(name, {}):
                continue
            outcome = run(name, change(replace(base, seed=seed, fold=seed)), images, network_config, output.parent)
            for option, dice in outcome.dice.items():
                runs.setdefault(option, {})[str(seed)] = dice
            logger.info("seed %d, %s: %s, %.1f images/s", seed, name, outcome.dice, outcome.images_per_second)
            text = json.dumps(
                {
                    "machine": machine(),
                    "versions": versions(),
                    "settings": settings,
                    "runs": runs,
                    "options": summarise(runs),
                },
                indent=2,
            )
            output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
