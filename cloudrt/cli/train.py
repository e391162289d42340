"""`cloudrt-train`: parse, train, say what came of it."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import click

from cloudrt.cli.common import Failure, progress_bar, reports_errors, say_logs
from cloudrt.cli.types import Size


@click.command()
@click.argument("data", type=click.Path(path_type=Path), default=Path("data"))
@click.option("--name", help="Name of the run; the date and time by default.")
@click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Folder of runs."
)
@click.option("--overwrite", is_flag=True, help="Train into a run folder that exists.")
@click.option(
    "--cache", type=click.Path(path_type=Path), help="Folder for decoded data sets; the user's cache by default."
)
@click.option("--architecture", default="FPN", show_default=True, help="Any of segmentation_models_pytorch.")
@click.option("--encoder", default="se_resnext101_32x4d", show_default=True, help="Any of segmentation_models_pytorch.")
@click.option(
    "--encoder-weights", type=click.Choice(["imagenet", "none"]), default="imagenet", show_default=True,
    help="imagenet downloads them once.",
)  # fmt: skip
@click.option("--set", "options", multiple=True, metavar="KEY=VALUE", help="Further argument of the architecture.")
@click.option("--input-size", type=Size(), default="640x320", show_default=True, help="Multiples of 32.")
@click.option("--epochs", default=50, show_default=True)
@click.option("--batch-size", default=6, show_default=True)
@click.option("--accumulate", default=3, show_default=True, help="Batches behind each optimiser step.")
@click.option("--optimizer", type=click.Choice(["radam", "adamw"]), default="radam", show_default=True)
@click.option("--encoder-lr", default=1e-3, show_default=True)
@click.option("--decoder-lr", default=2e-3, show_default=True)
@click.option("--weight-decay", default=0.0, show_default=True)
@click.option(
    "--schedule", type=click.Choice(["plateau", "one-cycle", "constant"]), default="plateau", show_default=True,
    help="plateau multiplies the rates by 0.3 after 5 epochs without a lower held-out loss.",
)  # fmt: skip
@click.option(
    "--loss", type=click.Choice(["bce-dice", "bce", "dice", "focal", "iou"]), default="bce-dice", show_default=True
)
@click.option(
    "--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto", show_default=True,
    help="auto is bf16 or fp16 on a GPU and fp32 on a CPU.",
)  # fmt: skip
@click.option("--validation-share", default=0.08, show_default=True, help="Part of the training images held out.")
@click.option("--augment/--no-augment", default=True, show_default=True)
@click.option("--seed", default=142, show_default=True, help="The same seed gives the same run on a CPU.")
@click.option("--workers", type=int, help="Processes that load images; by default up to 8 with a GPU, none without.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1.")
@click.option("--limit", default=0, help="Use the first so many images only, for a quick look.")
@reports_errors
def train(
    data: Path, name: str | None, runs: Path, overwrite: bool, cache: Path | None, workers: int | None,
    options: tuple[str, ...], **settings: Any,
) -> None:  # fmt: skip
    """Train on DATA, a folder in the competition's layout, and find the rule of each class.

    Writes best.pth, last.pth, config.json, history.csv and curves.png into runs/NAME.
    """
    from cloudrt.data import open_data

    open_data(data)  # before the seconds that torch takes to load
    say_logs("cloudrt", logging.INFO)
    import platformdirs

    folder = runs / (name or time.strftime("%Y%m%d-%H%M%S"))
    if (folder / "best.pth").exists() and not overwrite:
        raise Failure(f"{folder} holds a run already: give another --name, or --overwrite")
    from cloudrt.train.config import TrainConfig
    from cloudrt.train.loop import train as run

    config = TrainConfig(**settings, options=_options(options), workers=_workers(workers, settings["device"]))
    root = cache or Path(platformdirs.user_cache_dir("cloudrt")) / "datasets"
    result = run(config, data, folder, root, bar=progress_bar)
    click.echo(
        f"Held-out Dice {result.dice:.4f} at epoch {result.epoch} (predicting nothing scores {result.all_empty:.4f}), "
        f"{result.images_per_second:.1f} images/s in training"
    )
    click.echo(f"Next: cloudrt-export {folder / 'best.pth'}")


def _options(texts: tuple[str, ...]) -> dict[str, Any]:
    options = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key.isidentifier():
            raise Failure(f"--set {text}: expected KEY=VALUE, such as decoder_pyramid_channels=128")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def _workers(wanted: int | None, device: str) -> int:
    """Return how many loader processes: none on a CPU, where they would take cores from the network."""
    if wanted is not None:
        return wanted
    import torch

    from cloudrt.cpus import usable_cpus

    return min(8, usable_cpus() - 1) if device != "cpu" and torch.cuda.is_available() else 0
