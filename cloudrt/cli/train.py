"""`cloudrt-train`: parse, train, say what came of it."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from shlex import quote
from typing import Any

import click

from cloudrt.cli.types import Duration, Size
from cloudrt.system.cache import cache_folder
from cloudrt.system.terminal import Failure, progress_bar, reports_errors, say_logs


@click.command()
@click.argument("data", type=click.Path(path_type=Path), default=Path("data"))
@click.option("--name", help="Name of the run; the date and time by default.")
@click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Folder of runs."
)
@click.option("--overwrite", is_flag=True, help="Train into a run folder that exists.")
@click.option("--resume", is_flag=True, help="Go on with a run that was cut short, after its last whole epoch.")
@click.option(
    "--cache", type=click.Path(path_type=Path), help="Folder for decoded data sets; the user's cache by default."
)
@click.option("--architecture", default="FPN", show_default=True, help="Any of segmentation_models_pytorch.")
@click.option("--encoder", default="se_resnext101_32x4d", show_default=True, help="Any of segmentation_models_pytorch.")
@click.option(
    "--encoder-weights",
    type=click.Choice(["imagenet", "none"]),
    default="imagenet",
    show_default=True,
    help="imagenet downloads them once.",
)
@click.option(
    "--init",
    default="",
    metavar="PTH",
    help="Start with the weights of this checkpoint, as far as they fit, instead of --encoder-weights.",
)
@click.option("--set", "options", multiple=True, metavar="KEY=VALUE", help="Further argument of the architecture.")
@click.option("--input-size", type=Size(), default="640x320", show_default=True, help="Multiples of 32.")
@click.option(
    "--presence",
    type=click.Choice(["none", "head", "top-k"]),
    default="none",
    show_default=True,
    help="Decide apart from the masks whether a class is there: by a classification head, or by the highest pixels.",
)
@click.option("--presence-weight", default=0.5, show_default=True, help="Of the head's loss.")
@click.option("--top-k", default=2000, show_default=True, help="How many pixels, for --presence top-k.")
@click.option("--pretrain-epochs", default=0, show_default=True, help="Epochs on brightness alone, before the labels.")
@click.option("--epochs", default=50, show_default=True)
@click.option("--batch-size", default=6, show_default=True)
@click.option("--accumulate", default=3, show_default=True, help="Batches behind each optimiser step.")
@click.option("--optimizer", type=click.Choice(["radam", "adamw"]), default="radam", show_default=True)
@click.option("--encoder-lr", default=1e-3, show_default=True)
@click.option("--decoder-lr", default=2e-3, show_default=True)
@click.option("--weight-decay", default=0.0, show_default=True)
@click.option(
    "--schedule",
    type=click.Choice(["plateau", "one-cycle", "cosine", "constant"]),
    default="plateau",
    show_default=True,
    help="plateau multiplies the rates by 0.3 after 5 epochs without a lower held-out loss.",
)
@click.option(
    "--loss",
    default="bce+dice",
    show_default=True,
    metavar="SUM",
    help="bce, dice, iou, focal, lovasz, or a weighted sum such as 0.5*iou+dice+focal.",
)
@click.option(
    "--loss-over",
    type=click.Choice(["batch", "samples"]),
    default="batch",
    show_default=True,
    help="Count overlaps over a whole batch, or for each image.",
)
@click.option(
    "--ema", default=0.0, show_default=True, help="Decay of the weights' moving average, such as 0.999; 0: none."
)
@click.option("--freeze-batchnorm", is_flag=True, help="Keep BatchNorm's statistics as they are.")
@click.option(
    "--tta",
    type=click.Choice(["none", "h", "v", "hv"]),
    default="none",
    show_default=True,
    help="Flips in validation; export with the same --tta.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="auto is bf16 or fp16 on a GPU and fp32 on a CPU.",
)
@click.option("--validation-share", default=0.08, show_default=True, help="Part of the training images held out.")
@click.option("--folds", default=0, show_default=True, help="Cross-validate in so many folds, stratified by classes.")
@click.option("--fold", type=int, help="Train this one alone, from 0; all of them otherwise.")
@click.option("--group-similar", is_flag=True, help="Keep images that look nearly alike in one fold.")
@click.option(
    "--augment",
    type=click.Choice(["none", "flips", "notebook", "blur", "elastic", "strong"]),
    default="notebook",
    show_default=True,
)
@click.option("--seed", default=142, show_default=True, help="The same seed gives the same run on a CPU.")
@click.option("--workers", type=int, help="Processes that load images; by default up to 8 with a GPU, none without.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1.")
@click.option("--compile", is_flag=True, help="Let torch.compile make the network faster; takes minutes at first.")
@click.option("--time-budget", type=Duration(), default="0", help="End after this time: 90m, 2h, or seconds.")
@click.option("--tensorboard", is_flag=True, help="Write runs/NAME/tensorboard too.")
@click.option("--limit", default=0, help="Use the first so many images only, for a quick look.")
@reports_errors
def train(
    data: Path,
    name: str | None,
    runs: Path,
    overwrite: bool,
    resume: bool,
    cache: Path | None,
    workers: int | None,
    options: tuple[str, ...],
    fold: int | None,
    **settings: Any,
) -> None:
    """Train on DATA (default: data/), a folder in the competition's layout, and find the rule of each class.

    Writes best.pth, last.pth, config.json, history.csv and curves.png into runs/NAME. With --folds, each fold has a
    folder of its own there, all share the rules that are chosen on the images that each had held out, and oof.npz
    keeps those probabilities. On several GPUs or machines, start it with torchrun.
    """
    from cloudrt.data.folder import open_data

    open_data(data)  # before the seconds that torch takes to load
    say_logs("cloudrt", logging.INFO)
    if resume and not name:
        raise Failure("--resume goes on with a run: give its --name")
    if resume and overwrite:
        raise Failure("--resume goes on, --overwrite begins afresh: give one of them")
    if fold is not None and not settings["folds"]:
        raise Failure("--fold is one of --folds")
    folder = runs / (name or time.strftime("%Y%m%d-%H%M%S"))
    every = settings["folds"] and fold is None
    traces = ("config.json", "best.pth", "folds.json", "fold-0")
    if any((folder / trace).exists() for trace in traces) and not (overwrite or resume):
        raise Failure(f"{folder} holds a run already: --resume it, give another --name, or --overwrite")
    from cloudrt.train.config import TrainConfig
    from cloudrt.train.cross import cross_validate
    from cloudrt.train.loop import train as run

    config = TrainConfig(
        **settings, fold=fold or 0, options=_options(options), workers=_workers(workers, settings["device"])
    )
    tta = "" if config.tta == "none" else f" --tta {config.tta}"
    root = cache or cache_folder("datasets")
    if every:
        crossed = cross_validate(config, data, folder, root, progress_bar, resume=resume)
        click.echo(
            f"Out-of-fold Dice {crossed.dice:.4f}, folds alone {', '.join(f'{one:.4f}' for one in crossed.folds)} "
            f"(predicting nothing scores {crossed.all_empty:.4f})"
        )
        click.echo(
            f"Next: cloudrt-export {quote(str(folder))}/fold-*/best.pth{tta} -o {quote(str(folder / 'model.onnx'))}"
        )
        return
    result = run(config, data, folder, root, bar=progress_bar, resume=resume)
    if result.epoch == 0:  # of several processes, the first one tells
        return
    click.echo(
        f"Held-out Dice {result.dice:.4f} at epoch {result.epoch} (predicting nothing scores {result.all_empty:.4f}), "
        f"{result.images_per_second:.1f} images/s in training"
    )
    click.echo(f"Next: cloudrt-export {quote(str(folder / 'best.pth'))}{tta}")


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

    from cloudrt.system.machine import usable_cpus

    return min(8, usable_cpus() - 1) if device != "cpu" and torch.cuda.is_available() else 0
