"""Distillation from stored probabilities: the targets, the loss, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from cloudrt.train.cache import DatasetCache, open_cache
from cloudrt.train.config import TrainConfig
from cloudrt.train.cross import cross_validate
from cloudrt.train.dataset import CloudDataset
from cloudrt.train.loop import train
from cloudrt.train.teacher import Teacher
from numpy.typing import NDArray
from support.training import SMALL, interrupt_after, train_arguments, weights

from cloudrt.cli.train import train as command
from cloudrt.data.folder import open_data
from cloudrt.errors import DataError
from cloudrt.labels import Labels
from cloudrt.masks.rle import unpack_mask
from cloudrt.model.network_config import NetworkConfig
from cloudrt.search.probabilities import ProbabilityWriter, write_probabilities

ONE_STEP = replace(
    SMALL, presence="head", loss="bce", epochs=1, batch_size=8, accumulate=1, augment="notebook", validation_share=0.3
)
"""The input has another shape than the masks, which the augmentation also moves."""


@pytest.fixture
def cache(scenes: Path, cached: Path) -> DatasetCache:
    return open_cache(open_data(scenes), SMALL.input_size, cached)


def labels_of(scenes: Path) -> Labels:
    return open_data(scenes).labels


@contextmanager
def writing(path: Path, scenes: Path) -> Iterator[ProbabilityWriter]:
    with write_probabilities(path, labels_of(scenes)) as writer:
        yield writer


def truth(cache: DatasetCache, position: int, grid: tuple[int, int]) -> NDArray[np.uint8]:
    """The masks of an image, (C, W, H), 0 or 1."""
    return np.stack([unpack_mask(bits, grid).T for bits in cache.truth[position]])


@pytest.fixture
def certain(scenes: Path, cache: DatasetCache, tmp_path: Path) -> Path:
    """A teacher that returns the labels."""
    path = tmp_path / "certain.npz"
    with writing(path, scenes) as writer:
        for position, name in enumerate(cache.names):
            masks = truth(cache, position, labels_of(scenes).submit_grid)
            writer.add(name, 255 * masks, 255 * masks.max(axis=(1, 2)))
    return path


def test_the_teachers_maps_are_resized_as_opencv_does_and_augmented_like_the_masks(
    scenes: Path, cache: DatasetCache, certain: Path
) -> None:
    config = NetworkConfig("FPN", "resnet18", SMALL.options, SMALL.input_size)
    teacher = Teacher(certain, cache.names, config.labels, SMALL.input_size, presence=True)
    moved = 0
    for augment in ("none", "flips", "notebook"):
        dataset = CloudDataset(cache, np.arange(len(cache.names)), config, augment, 3, teacher)
        plain = CloudDataset(cache, np.arange(len(cache.names)), config, augment, 3)
        for index in range(len(dataset)):
            image, mask, levels, presence = dataset[index]
            assert levels.shape == mask.shape
            for ours, theirs in zip((image, mask), plain[index], strict=True):
                assert torch.equal(ours, theirs)
            # Area and nearest-neighbour resizing differ at borders of masks only.
            assert ((levels > 127) != (mask > 0)).float().mean() < 0.03
            present = cache.truth[index].any(axis=1)
            assert presence.tolist() == (255 * present).tolist()
            moved += int(not torch.equal(image, torch.from_numpy(np.array(cache.images[index]))))
    assert moved > len(cache.names) / 2


def test_a_teacher_that_knows_the_labels_changes_nothing(
    scenes: Path, cached: Path, cache: DatasetCache, tmp_path: Path
) -> None:
    """The cross-entropy is linear in its target: half of it on the labels and half on equal probabilities is the whole.

    The masks fill the image or are empty, so that both resizings agree.
    """
    rows = open_data(scenes)
    path = tmp_path / "full.npz"
    full = np.zeros_like(cache.truth)
    chosen = np.random.default_rng(5).random(full.shape[:2]) < 0.5
    height, width = rows.labels.submit_grid
    for (image, label), present in np.ndenumerate(chosen):
        full[image, label] = np.packbits(np.full(height * width, present))[: full.shape[2]]
    with writing(path, scenes) as writer:
        for name, present in zip(cache.names, chosen, strict=True):
            maps = np.broadcast_to(present[:, None, None], (len(present), width, height))
            writer.add(name, 255 * maps.astype(np.uint8), 255 * present.astype(np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cloudrt.train.loop.open_cache", lambda *_: replace_truth(cache, full))
        train(ONE_STEP, scenes, tmp_path / "alone", cached)
        for share in (0.5, 1.0):
            taught = replace(ONE_STEP, teacher=str(path), teacher_weight=share)
            train(taught, scenes, tmp_path / f"taught-{share}", cached)
    alone = weights(tmp_path / "alone" / "last.pth")
    for share in (0.5, 1.0):
        for name, value in weights(tmp_path / f"taught-{share}" / "last.pth").items():
            torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=2e-4, msg=f"{share} {name}")


def replace_truth(cache: DatasetCache, full: NDArray[np.uint8]) -> DatasetCache:
    return DatasetCache(cache.names, cache.images, full, cache.failures)


def test_what_a_teacher_cannot_teach_is_refused(
    scenes: Path, cached: Path, cache: DatasetCache, certain: Path, tmp_path: Path
) -> None:
    few, headless, partly, other = (tmp_path / f"{name}.npz" for name in ("few", "headless", "partly", "other"))
    masks = [truth(cache, position, labels_of(scenes).submit_grid) for position in range(len(cache.names))]
    with writing(few, scenes) as writer:
        writer.add(cache.names[0], masks[0], masks[0].max(axis=(1, 2)))
    with writing(headless, scenes) as writer:
        for name, one in zip(cache.names, masks, strict=True):
            writer.add(name, one)
    with writing(partly, scenes) as writer:
        for name, one in zip(cache.names, masks, strict=True):
            writer.add(name, one, one.max(axis=(1, 2)) if name == min(cache.names) else None)
    os.mkfifo(tmp_path / "pipe")
    with write_probabilities(other, replace(labels_of(scenes), classes=("a", "b", "c", "d"))) as writer:
        writer.add("x.jpg", masks[0])
    for path, reason in (
        (few, "lacks .* training images"),
        (headless, "no presence"),
        (partly, "no presence"),
        (tmp_path / "pipe", "not a regular file"),
        (other, "other classes or grids"),
        (tmp_path / "none.npz", "is missing"),
    ):
        with pytest.raises(DataError, match=reason):
            train(replace(ONE_STEP, teacher=str(path)), scenes, tmp_path / "run", cached)
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(DataError, match="teacher_weight must be above 0"):
            TrainConfig(teacher_weight=share)
    with pytest.raises(DataError, match=r"teacher_weight is 0\.6, but no teacher is given"):
        TrainConfig(teacher_weight=0.6)
    for option in ("--teacher", "--held-out", "--init"):
        done = CliRunner().invoke(command, train_arguments(scenes, tmp_path / "runs", cached, option, ""))
        assert done.exit_code == 2 and f"{option} is empty" in done.output
    words = train_arguments(scenes, tmp_path / "runs", cached, "--teacher", str(few))
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 2
    assert "few.npz lacks" in done.output


@pytest.mark.parametrize("count", [0, 2])
def test_a_run_resumes_only_with_the_files_it_started_with(
    scenes: Path, cached: Path, cache: DatasetCache, certain: Path, tmp_path: Path, count: int
) -> None:
    listed = tmp_path / "listed.txt"
    listed.write_text("\n".join(cache.names[:4]))
    config = replace(ONE_STEP, teacher=str(certain), held_out=str(listed), epochs=2, folds=count)
    run = cross_validate if count else train
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(1, patch)
        run(config, scenes, tmp_path / "run", cached)
    other = tmp_path / "other.npz"
    with writing(other, scenes) as writer:
        for name in cache.names:
            writer.add(name, np.zeros((4, *labels_of(scenes).submit_grid[::-1]), np.uint8), np.zeros(4, np.uint8))
    more = "\n".join(cache.names[:5]).encode()
    for path, content, option in ((certain, other.read_bytes(), "teacher"), (listed, more, "held_out")):
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"the file of {option} has changed since the run in"):
            run(config, scenes, tmp_path / "run", cached, resume=True)
        path.write_bytes(before)
    run(config, scenes, tmp_path / "run", cached, resume=True)


def test_a_teacher_of_held_out_images_is_a_warning(
    scenes: Path, cached: Path, certain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "cloudrt"):
        train(replace(ONE_STEP, teacher=str(certain)), scenes, tmp_path / "run", cached)
    assert "held-out images. Its networks may have been trained on held-out images" in caplog.text


def test_files_that_overwrite_would_remove_are_refused(
    scenes: Path, cached: Path, certain: Path, tmp_path: Path
) -> None:
    inside = tmp_path / "runs" / "run" / "fold-0" / "mine.npz"
    inside.parent.mkdir(parents=True)
    inside.write_bytes(certain.read_bytes())
    words = train_arguments(
        scenes, tmp_path / "runs", cached, "--overwrite", "--folds", "2", "--teacher", str(inside), "--presence", "head"
    )
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 2 and "(--teacher) would be removed with the earlier run" in done.output
    assert inside.exists()


def test_several_processes_read_one_teacher(scenes: Path, cached: Path, certain: Path, tmp_path: Path) -> None:
    config = replace(ONE_STEP, teacher=str(certain))
    train(config, scenes, tmp_path / "none", cached)
    train(replace(config, workers=2), scenes, tmp_path / "two", cached)
    ours, theirs = (weights(tmp_path / name / "last.pth") for name in ("two", "none"))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
