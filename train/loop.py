"""A training run: data set -> best.pth, last.pth, state.pth, config.json, held_out.txt, history.csv, curves.png.

`train` opens the dataset cache, splits it, builds the network and its trainer, and clears or continues the run folder.
`epochs.Run` then trains, validates and writes the results.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cloudrt.data.folder import open_data
from cloudrt.errors import DataError
from cloudrt.images.inputs import read_names
from cloudrt.labels import Labels
from cloudrt.search.tune import require_rows
from cloudrt.system.files import locked, replacing
from cloudrt.system.progress import ProgressBar, no_progress

from .cache import DatasetCache, open_cache
from .config import TrainConfig
from .dataset import CloudDataset
from .distributed import Processes, processes
from .epochs import Run, RunInfo, TrainResult
from .folds import folds, split, split_listed
from .optimise import find_device, find_precision, seed_all
from .pretrain import pretrain
from .run_files import CROSS_RESULTS, RUN_RESULTS, TENSORBOARD
from .start import check_shape, describe_images, digest_inputs, read_state, start
from .teacher import Teacher
from .trainer import Trainer
from .validate import Validator

logger = logging.getLogger(__name__)

LOCK = ".lock"
BUSY = "wait until it ends, or use another --name"


def train(
    config: TrainConfig,
    data: Path,
    folder: Path,
    cache_root: Path,
    bar: ProgressBar = no_progress,
    *,
    resume: bool = False,
    replaces: Sequence[Path] = (),
) -> TrainResult:
    """Train a network on the data set `data` and write the run to `folder`.

    With `resume`, continue after the last complete epoch. Under `torchrun`, all processes train one network, and rank 0
    validates and writes the files. An earlier run in `folder` is removed, with the files and folders `replaces`, once
    the data and the network of this one are known to work.

    Raises
    ------
    DataError
        Missing or malformed data, a device or precision that is not available, fewer training images than processes, a
        network that cannot be built, a loss that is not finite, or a folder that another run writes to; a run to resume
        that is finished or had other options.
    ArtifactError
        The checkpoint `config.init` cannot be read.
    """
    with processes(config.device) as group, locked(folder / LOCK, BUSY) if group.first else nullcontext():
        return _train(config, data, folder, cache_root, bar if group.first else no_progress, resume, replaces, group)


def _train(
    config: TrainConfig,
    data: Path,
    folder: Path,
    cache_root: Path,
    bar: ProgressBar,
    resume: bool,
    replaces: Sequence[Path],
    group: Processes,
) -> TrainResult:
    source = open_data(data)
    device = find_device(config.device, group.local_rank)
    seed_all(config.seed)
    digests = digest_inputs(config)
    state = read_state(folder, config, digests) if resume else None
    begun = start(config, source.labels, state)
    network = begun.network.to(device).to(memory_format=torch.channels_last)
    rows = source.read_train()
    names = list(rows)[: config.max_images or None]
    listed = frozenset(read_names(Path(config.held_out)) if config.held_out else ())
    require_rows(source, rows, sorted(listed))
    unlisted = source.describe_unlisted()
    if unlisted and group.first:
        logger.warning("%s", unlisted)
    if not group.first:
        group.barrier()  # rank 0 builds the cache
    with bar("Caching images", len(names)) as advance:
        cache = open_cache(source, config.input_size, cache_root, config.max_images, advance)
    if group.first:
        group.barrier()
    training, held_out = _split(cache, config, listed)
    if len(training) < group.world_size:
        raise DataError(f"{len(training)} training images are too few for {group.world_size} processes: use fewer")
    images = describe_images(cache.names, training, held_out, source.labels)
    if state and state["images"] != images:
        raise DataError(f"{folder} was trained on other images or classes than {data} contains now: use --overwrite")
    check_shape(network, begun.config)
    teacher = _open_teacher(config, cache, training, held_out, source.labels) if config.teacher else None
    logger.info(
        "%d training images, %d held out, %d unreadable; %s with %s on %s in %s",
        len(training),
        len(held_out),
        len(cache.failures),
        config.architecture,
        config.encoder,
        device,
        find_precision(config.precision, device),
    )
    _warn_of_absent_classes(cache, held_out, source.labels.classes)
    if group.first:
        folder.mkdir(parents=True, exist_ok=True)
        if state is None:
            own = [folder / name for name in (*RUN_RESULTS, TENSORBOARD, *CROSS_RESULTS)]
            for old in (*replaces, *own, *folder.glob("fold-[0-9]*")):
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink(missing_ok=True)
        with replacing(folder / "config.json") as path:
            stored = config.to_dict() | {"data": str(data), "network": begun.config.to_dict(), "sha256": digests}
            path.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        with replacing(folder / "held_out.txt") as path:  # for `cloudrt tune --image-list`
            path.write_text("".join(f"{cache.names[position]}\n" for position in held_out), encoding="utf-8")
    dataset = CloudDataset(cache, training, begun.config, config.augment, config.seed, teacher)
    if config.pretrain_epochs and state is None:
        with bar("Pre-training", config.pretrain_epochs * len(dataset)) as advance:
            pretrain(network, dataset, config, device, advance)
    trainer = Trainer(config, network, dataset, device, group)
    validator = Validator(
        loss=trainer.loss,
        cache=cache,
        positions=held_out,
        batch_size=config.batch_size,
        device=device,
        autocast=trainer.autocast,
        tta=config.tta,
        scratch=folder,
    )
    return Run(RunInfo(folder, begun.config, begun.license, images), trainer, validator, state).run(bar)


def _split(
    cache: DatasetCache, config: TrainConfig, listed: Collection[str]
) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
    """Return the positions of the training and of the held-out images."""
    for name, reason in cache.failures.items():
        logger.warning("%s %s: excluded", name, reason)
    if config.folds:
        parts = folds(cache, config.folds, config.seed, config.group_similar, listed)
        rest = [part for number, part in enumerate(parts) if number != config.fold]
        return np.sort(np.concatenate(rest)), parts[config.fold]
    return split_listed(cache, listed) if listed else split(cache, config.validation_share, config.seed)


def _open_teacher(
    config: TrainConfig, cache: DatasetCache, training: NDArray[np.int_], held_out: NDArray[np.int_], labels: Labels
) -> Teacher:
    names = [cache.names[position] for position in training]
    teacher = Teacher(Path(config.teacher), names, labels, config.input_size, config.presence == "head")
    known = sum(cache.names[position] in teacher.names for position in held_out)
    if known:
        logger.warning(
            "%s has predictions of %d of the %d held-out images. Its networks may have been trained on held-out "
            "images, which makes the held-out Dice too high: hold out the same images from the teachers and this run",
            config.teacher,
            known,
            len(held_out),
        )
    return teacher


def _warn_of_absent_classes(cache: DatasetCache, held_out: NDArray[np.int_], classes: tuple[str, ...]) -> None:
    present: NDArray[np.bool_] = np.any(cache.truth[held_out], axis=(0, 2))
    absent = [label for label, found in zip(classes, present.tolist(), strict=True) if not found]
    if absent:
        logger.warning(
            "no held-out image contains %s: its rule cannot be chosen; hold out more images, or use --folds",
            ", ".join(absent),
        )
