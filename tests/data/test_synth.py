"""Synthetic scenes: reproducible by seed, in the competition's layout, with a different texture for each class."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from support.files import contents

import cloudrt.data.scenes
from cloudrt.cli.synth import synth
from cloudrt.data.scenes import SyntheticScene, draw_scene
from cloudrt.data.synth import write_dataset
from cloudrt.errors import DataError
from cloudrt.labels import CLASSES, LABEL_GRID
from cloudrt.masks.rle import rle_decode

SMALL = (70, 105)


def rows(table: Path) -> list[list[str]]:
    with table.open(newline="") as lines:
        return list(csv.reader(lines))


def test_same_seed_same_bytes_for_any_number_of_threads(tmp_path: Path) -> None:
    for name, threads, seed in (("one", 1, 7), ("two", 2, 7), ("other", 2, 8)):
        write_dataset(tmp_path / name, 6, SMALL, seed, threads=threads)
    one, two, other = (contents(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert not {name for name in one if name.endswith("jpg")} & set(other)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--days", "1"], "--days needs --panorama"),
        (["--panorama", "210x70", "-n", "200"], "--images does not apply with --panorama"),
        (["--panorama", "210x70", "--test-share", "0.25"], "--test-share does not apply with --panorama"),
    ],
)
def test_options_without_effect_are_refused(tmp_path: Path, words: list[str], named: str) -> None:
    done = CliRunner().invoke(synth, [str(tmp_path / "out"), *words])
    assert done.exit_code == 2 and named in done.output
    assert not (tmp_path / "out").exists()


def test_scene_depends_on_its_seed_alone() -> None:
    seed = np.random.SeedSequence(3, spawn_key=(1,))
    first, again = draw_scene(seed, SMALL), draw_scene(seed, SMALL)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.masks, again.masks)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "data"
    written = write_dataset(out, 8, (140, 210), seed=1, test_share=0.3)
    assert (written.path, written.train, written.test) == (out, 6, 2)
    return out


def test_layout_and_tables(dataset: Path) -> None:
    assert sorted(path.name for path in dataset.iterdir()) == [
        "sample_submission.csv",
        "test_images",
        "test_truth.csv",
        "train.csv",
        "train_images",
    ]
    for part, tables in (("train", ["train.csv"]), ("test", ["test_truth.csv", "sample_submission.csv"])):
        images = {path.name for path in (dataset / f"{part}_images").iterdir()}
        for name in tables:
            assert b"\r" not in (dataset / name).read_bytes()
            header, *body = rows(dataset / name)
            assert header == ["Image_Label", "EncodedPixels"]
            keys = [key for key, _ in body]
            order = [key.rpartition("_")[0] for key in keys[::4]]
            assert set(order) == images and len(order) == len(images)
            assert keys == [f"{image}_{label}" for image in order for label in CLASSES]
    assert {text for _, text in rows(dataset / "sample_submission.csv")[1:]} == {"1 1"}


def test_tables_hold_the_scenes_masks_and_images_their_pixels(dataset: Path) -> None:
    seeds = np.random.SeedSequence(1).spawn(9)[1:]
    body = rows(dataset / "train.csv")[1:] + rows(dataset / "test_truth.csv")[1:]
    for index, seed in enumerate(seeds):
        scene = draw_scene(seed, (140, 210))
        for (_, text), mask in zip(body[4 * index : 4 * index + 4], scene.masks, strict=True):
            assert np.array_equal(rle_decode(text, LABEL_GRID), mask)
        name = body[4 * index][0].rpartition("_")[0]
        (path,) = dataset.glob(f"*/{name}")
        read = cv2.imread(str(path))
        assert read is not None and read.shape == scene.image.shape
        assert np.abs(read[..., ::-1].astype(int) - scene.image).mean() < 6


def test_bands_are_black_and_never_labelled() -> None:
    shares = []
    for seed in range(6):
        scene = draw_scene(seed, LABEL_GRID)
        assert np.array_equal(scene.bands, (scene.image == 0).all(axis=2))
        assert np.array_equal(scene.bands, (scene.image == 0).any(axis=2))
        assert not (scene.masks & scene.bands).any()
        shares.append(scene.bands.mean())
    assert 0.02 < np.mean(shares) < 0.2


def test_one_seed_gives_one_scene_at_every_size() -> None:
    large, small = draw_scene(11, (700, 1050)), draw_scene(11, (140, 210))
    assert np.array_equal(large.masks, small.masks)
    shrunk = cv2.resize(large.image, (210, 140), interpolation=cv2.INTER_AREA)
    one, other = (cv2.GaussianBlur(image, (0, 0), 3).ravel().astype(np.float64) for image in (shrunk, small.image))
    assert np.corrcoef(one, other)[0, 1] > 0.9


def test_classes_come_as_often_as_in_the_competition() -> None:
    rng = np.random.default_rng(0)
    layouts = [cloudrt.data.scenes._lay_out(rng) for _ in range(2000)]
    present = np.array([[any(name == label for name, _ in patches) for label in CLASSES] for patches in layouts])
    # train.csv: Fish 0.50, Flower 0.43, Gravel 0.53, Sugar 0.68; 0.47 of all rows are empty; 1 to 4 classes an image.
    assert np.allclose(present.mean(axis=0), (0.50, 0.43, 0.53, 0.68), atol=0.05)
    assert np.allclose(np.bincount(present.sum(axis=1)) / 2000, (0, 0.24, 0.43, 0.28, 0.05), atol=0.04)


def test_masks_are_as_large_as_in_the_competition() -> None:
    masks = [mask[::10, ::10] for seed in range(30) for mask in draw_scene(seed, (64, 96)).masks]
    areas = [mask.mean() for mask in masks if mask.any()]
    assert 0.2 < np.mean(areas) < 0.4
    # Unions of upright boxes: most labelled columns contain one run, which has two edges at most.
    edges = [np.abs(np.diff(mask.astype(int), axis=0)).sum() / mask.any(axis=0).sum() for mask in masks if mask.any()]
    assert np.mean(edges) < 2.5


def draw_alone(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> SyntheticScene:
    """A scene that one organisation fills."""
    monkeypatch.setattr(cloudrt.data.scenes, "_lay_out", lambda rng: [(name, (0.02, 0.02, 0.98, 0.98))])
    monkeypatch.setattr(cloudrt.data.scenes, "_band_polygons", lambda rng: [])
    return draw_scene(seed, (350, 525))


def coarseness(image: NDArray[np.uint8]) -> float:
    """Geometric mean period of the brightness, as a fraction of the width: power-weighted, between 2 and 100 pixels."""
    grey = image.mean(axis=2)
    power = np.abs(np.fft.fft2(grey - grey.mean())) ** 2
    frequency = np.hypot(np.fft.fftfreq(grey.shape[0])[:, None], np.fft.fftfreq(grey.shape[1])[None, :])
    band = (frequency > 0.01) & (frequency < 0.5)
    return float(np.exp(-np.average(np.log(frequency[band]), weights=power[band])) / grey.shape[1])


def test_each_organisation_has_its_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = {
        name: np.mean([coarseness(draw_alone(name, seed, monkeypatch).image) for seed in range(4)]) for name in CLASSES
    }
    assert 1.4 * scale["Sugar"] < scale["Gravel"] and 1.4 * scale["Gravel"] < scale["Flower"]
    assert 1.4 * scale["Gravel"] < scale["Fish"]


def test_fish_is_elongated_and_flower_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def elongation(image: NDArray[np.uint8]) -> float:
        """Largest over smallest eigenvalue of the structure tensor of the smoothed brightness."""
        dy, dx = np.gradient(cv2.GaussianBlur(image.mean(axis=2), (0, 0), 6))
        low, high = np.linalg.eigvalsh([[np.mean(dx * dx), np.mean(dx * dy)], [np.mean(dx * dy), np.mean(dy * dy)]])
        return float(high / low)

    fish, flower = (
        [elongation(draw_alone(name, seed, monkeypatch).image) for seed in range(4)] for name in ("Fish", "Flower")
    )
    assert min(fish) > 2 * max(flower)


def test_refuses_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match=r"is not empty: give another OUT$"):
        write_dataset(tmp_path, 2, SMALL)
    with pytest.raises(DataError, match="is not a folder: give the name of a folder to fill"):
        write_dataset(tmp_path / "mine.txt", 2, SMALL)
    assert contents(tmp_path) == {"mine.txt": b"precious"}


def test_fills_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_dataset(tmp_path / "data", 2, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert len(contents(tmp_path / "data")) == 5


@pytest.mark.parametrize(
    "options",
    [
        {"images": 1},
        {"size": (63, 200)},
        {"size": (200, 100_000)},
        {"test_share": 0.0},
        {"test_share": 1.0},
        {"test_share": float("nan")},
        {"threads": -1},
        {"seed": -1},
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(DataError):
        write_dataset(tmp_path / "out", **{"images": 2, "size": SMALL, **options})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_interrupted_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "out", 30, SMALL, threads=2, progress=stop)
    assert not list(tmp_path.iterdir())


def test_unwritable_place_gives_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_dataset(tmp_path / "file" / "out", 2, SMALL)
