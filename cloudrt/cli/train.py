"""`cloudrt-train`: parse, train, print the result."""

from __future__ import annotations

import logging
import os
from itertools import count
from pathlib import Path
from shlex import quote
from typing import Any

import click

from cloudrt.cli.types import FILE, Duration, KeyValue, Size
from cloudrt.system.cache import cache_folder
from cloudrt.system.paths import check_outputs, check_pictures
from cloudrt.system.progress import progress_bar
from cloudrt.system.terminal import Failure, log_to_stderr, reports_errors

logger = logging.getLogger(__name__)


@click.command()
@click.argument("data", type=FILE, default=Path("data"))
@click.option("--name", help="Name of the run. Default: run-1, or the next number that is free.")
@click.option("--runs", type=FILE, default=Path("runs"), show_default=True, help="Folder of all runs.")
@click.option("--overwrite", is_flag=True, help="Replace a run of the same name.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run after its last complete epoch.")
@click.option("--cache", type=FILE, help="Folder of dataset caches. Default: the user's cache.")
@click.option(
    "--architecture", default="FPN", show_default=True, help="Any architecture of segmentation_models_pytorch."
)
@click.option(
    "--encoder",
    default="se_resnext101_32x4d",
    show_default=True,
    help="Any encoder of segmentation_models_pytorch; those of timm begin with tu-.",
)
@click.option(
    "--encoder-weights",
    default="imagenet",
    show_default=True,
    metavar="imagenet|none|FILE",
    help="imagenet: from an installed package (extra weights), the local cache or the hub, in this order. FILE: a "
    "state dict of timm, torchvision or segmentation_models_pytorch. none: random.",
)
@click.option(
    "--init",
    type=FILE,
    metavar="PTH",
    help="Checkpoint of cloudrt, with the same --encoder, to take weights from instead of --encoder-weights.",
)
@click.option(
    "--set",
    "options",
    type=KeyValue(),
    multiple=True,
    help="Further argument of the architecture, such as finest_level=3 of FPN; can be repeated.",
)
@click.option(
    "--input-size",
    type=Size(),
    help="WIDTHxHEIGHT of the network's input, multiples of 32. Default: 640x320 for the competition's images; for "
    "other data, about as many pixels in the shape of its label grid.",
)
@click.option(
    "--presence",
    type=click.Choice(["none", "head", "top-k"]),
    default="none",
    show_default=True,
    help="Predict whether a class is present: by a classification head, or by the mean of the highest probabilities.",
)
@click.option(
    "--presence-weight",
    default=0.5,
    show_default=True,
    help="Weight of the head's loss; the loss of the masks has weight 1.",
)
@click.option("--top-k", default=2000, show_default=True, help="Number of pixels for --presence top-k.")
@click.option(
    "--label-smoothing",
    default=0.0,
    show_default=True,
    help="Label smoothing of the classification head: 0.1 gives targets of 0.05 and 0.95.",
)
@click.option(
    "--teacher",
    type=FILE,
    metavar="NPZ",
    help="Distillation: also learn from these probabilities of the training images, such as the oof.npz of an earlier "
    "run with --folds and the same --held-out.",
)
@click.option(
    "--teacher-weight",
    default=0.5,
    show_default=True,
    help="Weight of the loss on the teacher's probabilities; the loss on the labels has 1 minus this weight.",
)
@click.option(
    "--pretrain-epochs",
    default=0,
    show_default=True,
    help="Epochs of self-supervised pre-training: predict the brightness of images with hidden blocks.",
)
@click.option("--epochs", default=50, show_default=True, help="Number of epochs.")
@click.option("--batch-size", default=6, show_default=True, help="Images per batch, per process.")
@click.option("--accumulate", default=3, show_default=True, help="Batches per optimiser step.")
@click.option(
    "--optimizer", type=click.Choice(["radam", "adamw"]), default="radam", show_default=True, help="The optimiser."
)
@click.option("--encoder-lr", default=1e-3, show_default=True, help="Learning rate of the encoder.")
@click.option("--decoder-lr", default=2e-3, show_default=True, help="Learning rate of all other parameters.")
@click.option("--weight-decay", default=0.0, show_default=True, help="Weight decay.")
@click.option(
    "--schedule",
    type=click.Choice(["plateau", "one-cycle", "cosine", "constant"]),
    default="plateau",
    show_default=True,
    help="Learning-rate schedule. plateau: multiply by 0.3 after more than 5 epochs without a lower held-out loss.",
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
    help="Compute overlaps over the whole batch, or per image.",
)
@click.option(
    "--masks",
    type=click.Choice(["all", "present"]),
    default="all",
    show_default=True,
    help="present: compute dice, iou and lovasz only where an image has the class; bce, focal and the classification "
    "head use all images.",
)
@click.option(
    "--ema",
    default=0.0,
    show_default=True,
    help="Decay of the moving average of the weights, such as 0.999; 0 for none.",
)
@click.option("--freeze-batchnorm", is_flag=True, help="Use BatchNorm's running statistics without updating them.")
@click.option(
    "--tta",
    type=click.Choice(["none", "h", "v", "hv"]),
    default="none",
    show_default=True,
    help="Flips to average over in the final validation; give cloudrt-export the same --tta.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="auto: bf16 if the GPU or CPU has instructions for it (AVX-512 BF16, AMX), else fp16 on a GPU, fp32 on a CPU.",
)
@click.option(
    "--held-out",
    type=FILE,
    metavar="TXT",
    help="File with the names of the images to hold out, one per line, such as held_out.txt of an earlier run. With "
    "--folds, these images are in no fold. Default: a random --validation-share.",
)
@click.option("--validation-share", default=0.08, show_default=True, help="Fraction of the images to hold out.")
@click.option(
    "--folds",
    type=click.IntRange(0, 1000),
    default=0,
    show_default=True,
    help="Cross-validate with this number of folds, stratified by classes.",
)
@click.option("--fold", type=int, help="Train only this fold, from 0. Default: all.")
@click.option("--group-similar", is_flag=True, help="Keep near-duplicate images in one fold.")
@click.option(
    "--augment",
    type=click.Choice(["none", "flips", "notebook", "blur", "elastic", "strong"]),
    default="notebook",
    show_default=True,
    help="Augmentation: flips; the notebook's flips, shift, scale and distortion; these with blur or elastic "
    "distortion; or all of them with brightness and contrast.",
)
@click.option("--seed", default=142, show_default=True, help="Random seed; on a CPU, equal seeds give equal runs.")
@click.option(
    "--workers", type=click.IntRange(0, 1024), help="Data-loading processes. Default: up to 8 with a GPU, else 0."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:1.")
@click.option("--compile", is_flag=True, help="Use torch.compile; compiling takes minutes.")
@click.option(
    "--time-budget",
    type=Duration(),
    default="0",
    help="Maximum time of training, such as 90m, 2h or 300 (s), without --pretrain-epochs and validation; the schedule "
    "is shortened to fit. Default: no limit.",
)
@click.option("--tensorboard", is_flag=True, help="Also write TensorBoard logs, to runs/NAME/tensorboard.")
@click.option("--max-images", default=0, help="Use only this number of images, for a quick check. Default: all.")
@reports_errors
def train(
    data: Path,
    name: str | None,
    runs: Path,
    overwrite: bool,
    resume: bool,
    cache: Path | None,
    workers: int | None,
    options: tuple[tuple[str, Any], ...],
    fold: int | None,
    **settings: Any,
) -> None:
    """Train on DATA (default: data/), a folder in the competition's layout, and find the rule of each class.

    Writes best.pth, last.pth, config.json, held_out.txt, history.csv and curves.png to runs/NAME. With --folds, each
    fold has its own folder in runs/NAME, oof.npz contains the held-out predictions of all folds, and all folds share
    the rules chosen on them. To train on several GPUs or machines, use python -m cloudrt.train.launch or torchrun.
    """
    log_to_stderr("cloudrt", logging.INFO)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # only the first process on each machine
        logger.info("Loading PyTorch ...")
    from cloudrt.data.folder import open_data
    from cloudrt.train.run_files import all_files, refuse_removed

    source = open_data(data)  # check the data before importing torch, which takes seconds
    if resume and not name:
        raise Failure("--resume needs the --name of the run")
    if resume and overwrite:
        raise Failure("--resume and --overwrite exclude each other")
    if fold is not None and not settings["folds"]:
        raise Failure("--fold needs --folds")
    folder = runs / (name or next(one for one in map("run-{}".format, count(1)) if not (runs / one).exists()))
    every = settings["folds"] and fold is None
    traces = ("config.json", "best.pth", "folds.json", "fold-0")
    if any((folder / trace).exists() for trace in traces) and not (overwrite or resume):
        raise Failure(f"{folder} contains a run: use --resume, another --name, or --overwrite")
    root = cache or cache_folder("datasets")
    if cache is None and not root.is_absolute():
        raise Failure("the user has no home folder for dataset caches: name a folder with --cache")
    files = {key: settings[key] for key in ("init", "teacher", "held_out")}
    reads: dict[str, Path | None] = {f"--{key.replace('_', '-')}": path for key, path in files.items()}
    weights = None if settings["encoder_weights"] in ("imagenet", "none") else Path(settings["encoder_weights"])
    reads |= {"--encoder-weights": weights, "train.csv": source.train_csv, "data.json": data / "data.json"}
    settings |= {key: str(path or "") for key, path in files.items()}
    parts = [folder / f"fold-{number}" for number in range(settings["folds"])] if every else [folder]
    written = all_files(folder, parts)
    old = [part for part in folder.glob("fold-[0-9]*") if part not in parts]  # of an earlier run; they are removed
    check_outputs(
        {f"{path.relative_to(folder)} of --name": path for path in written},
        reads,
        folders={f"{part.name} of --name": part for part in parts} if every else {},
        stores={f"{part.name} of --name": part for part in old},
        images=source.image_paths(),
        overwrite=overwrite or resume,
    )
    refuse_removed(reads, folder if overwrite else None)
    check_pictures({"--runs": folder}, source.image_folders)
    from cloudrt.train.config import TrainConfig, default_input_size
    from cloudrt.train.cross import cross_validate
    from cloudrt.train.loop import train as run
    from cloudrt.train.optimise import default_workers

    settings["input_size"] = settings["input_size"] or default_input_size(source.labels)
    config = TrainConfig(
        **settings,
        fold=fold or 0,
        options=dict(options),
        workers=default_workers(settings["device"]) if workers is None else workers,
    )
    tta = "" if config.tta == "none" else f" --tta {config.tta}"
    if every:
        crossed = cross_validate(config, data, folder, root, progress_bar, resume=resume)
        click.echo(
            f"Out-of-fold Dice {crossed.dice:.4f} (all rows empty: {crossed.all_empty:.4f}); each fold with its own "
            f"rules: {', '.join(f'{one:.4f}' for one in crossed.folds)}"
        )
        command = f"{quote(str(folder))}/fold-*/best.pth{tta} -o {quote(str(folder / 'model.onnx'))}"
        click.echo(f"Next: cloudrt-export {command}" if crossed.dice > crossed.all_empty else NO_BETTER)
        return
    result = run(config, data, folder, root, bar=progress_bar, resume=resume)
    if result.epoch == 0:  # only rank 0 reports
        return
    click.echo(
        f"Held-out Dice {result.dice:.4f} at epoch {result.epoch} (all rows empty: {result.all_empty:.4f}), "
        f"{result.images_per_second:.1f} training images/s"
    )
    click.echo(
        "The Dice of an epoch is measured on the images that its rules were chosen on. The held-out Dice is out of "
        "fold: each fifth of the held-out images is scored with rules chosen on the others, as for new images."
    )
    command = f"{quote(str(folder / 'best.pth'))}{tta}"
    click.echo(f"Next: cloudrt-export {command}" if result.dice > result.all_empty else NO_BETTER)


NO_BETTER = "This is no better than empty rows: train for more epochs, or with more images, before you export"
