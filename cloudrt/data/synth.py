"""A synthetic data set in the competition's layout, for demos, tests and benchmarks.

    OUT/train_images/0a1b2c3.jpg    OUT/train.csv                 Image_Label,EncodedPixels; four rows per image
    OUT/test_images/4d5e6f7.jpg     OUT/sample_submission.csv     the rows of a submission
                                    OUT/test_truth.csv            the labels of the test images

Threads draw and compress scenes; the calling thread writes the tables, in order. Everything is written to a temporary
folder beside OUT, which is renamed at the end.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.data.scenes import check_size, draw_scene
from cloudrt.errors import DataError
from cloudrt.labels import CLASSES, LABEL_GRID
from cloudrt.masks.rle import rle_encode
from cloudrt.system.files import partial_path, remove_leftovers
from cloudrt.system.machine import usable_cpus
from cloudrt.system.overlap import overlap
from cloudrt.system.paths import check_outputs

HEADER = "Image_Label,EncodedPixels\n"
JPEG_QUALITY = 92
MOST_THREADS = 8
"""Largest default number of threads; each needs about 150 MB at 2100x1400."""


@dataclass(frozen=True)
class Written:
    """The result of `write_dataset`.

    Parameters
    ----------
    path
        The folder.
    train, test
        Number of images in train_images and in test_images.
    """

    path: Path
    train: int
    test: int


def write_dataset(
    out: Path,
    images: int = 200,
    size: tuple[int, int] = LABEL_GRID,
    seed: int = 0,
    *,
    test_share: float = 0.25,
    threads: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> Written:
    """Draw scenes and write them in the competition's layout.

    The same arguments give the same bytes for every number of `threads`. On any error, and on Ctrl-C, no file is left.

    Parameters
    ----------
    out
        A folder that does not exist, or is empty.
    images
        Total number of training and test images, at least 2.
    size
        Height and width of the images in pixels; the masks are on the 2100x1400 grid (width x height) for every size.
    seed
        0 or more. Scene k of a seed does not depend on `images`.
    test_share
        Fraction of the images for testing, between 0 and 1; both parts get at least one.
    threads
        Number of threads; 0 uses all usable cores, up to 8.
    progress
        Called in the calling thread as ``progress(done, images)`` after each image.

    Raises
    ------
    DataError
        Arguments out of range, `out` exists and is not empty, or the disk cannot be written.
    """
    if images < 2:
        raise DataError(f"a data set needs at least 2 images, one to train and one to test, found {images}")
    if not 0.0 < test_share < 1.0:
        raise DataError(f"test_share must lie between 0 and 1, found {test_share}")
    if threads < 0 or seed < 0:
        raise DataError(f"threads and seed must be 0 or more, found threads {threads}, seed {seed}")
    check_size(size)
    test = min(max(round(images * test_share), 1), images - 1)
    train = images - test

    # One child seed per scene: a scene depends on its number, not on the thread that draws it.
    naming, *seeds = np.random.SeedSequence(seed).spawn(images + 1)
    numbers = np.random.default_rng(naming).choice(16**7, images, replace=False)
    names = [f"{number:07x}.jpg" for number in numbers]

    threads = threads or min(usable_cpus(), MOST_THREADS)
    with output_folder(out) as folder, ThreadPoolExecutor(threads) as pool:
        try:
            paths = [folder / ("train_images" if k < train else "test_images") / name for k, name in enumerate(names)]
            for part in ("train_images", "test_images"):
                (folder / part).mkdir()
            scenes = zip(paths, seeds, strict=True)
            done = overlap(pool, lambda scene: _write_scene(*scene, size), scenes, 2 * threads)
            with _table(folder / "train.csv") as table:
                for k in range(train):
                    table.write(_rows(names[k], next(done)))
                    if progress:
                        progress(k + 1, images)
            with _table(folder / "test_truth.csv") as table, _table(folder / "sample_submission.csv") as sample:
                for k in range(train, images):
                    table.write(_rows(names[k], next(done)))
                    sample.write(_rows(names[k], ["1 1"] * len(CLASSES)))
                    if progress:
                        progress(k + 1, images)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return Written(out, train, test)


@contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `out` at the end of the block, or removed on an error."""
    check_outputs({}, folders={"OUT": out}, overwrite=None)
    out = Path(out).absolute()
    remove_leftovers(out.parent)
    partial = partial_path(out)
    try:
        partial.mkdir(parents=True)
        try:
            yield partial
            if out.exists():
                # An empty folder may be a mount point or a working directory: fill it instead of replacing it.
                for child in sorted(partial.iterdir()):
                    shutil.move(child, out)
            else:
                partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}") from error


def _table(path: Path) -> TextIO:
    """Open a table and write its header; lines end in LF on every system, as in the competition's files."""
    table = path.open("w", encoding="utf-8", newline="\n")
    table.write(HEADER)
    return table


def _rows(name: str, texts: list[str]) -> str:
    """Return the rows of one image, one per class, with an empty RLE for absent classes."""
    return "".join(f"{name}_{label},{text}\n" for label, text in zip(CLASSES, texts, strict=True))


def _write_scene(path: Path, seed: np.random.SeedSequence, size: tuple[int, int]) -> list[str]:
    """Draw one scene, write its JPEG, and return the RLE text of each class."""
    scene = draw_scene(seed, size)
    write_jpeg(path, scene.image)
    return [rle_encode(mask) for mask in scene.masks]


def write_jpeg(path: Path, image: NDArray[np.uint8], quality: int = JPEG_QUALITY) -> None:
    """Write an (H, W, 3) uint8 RGB image as a JPEG."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    sound, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not sound:
        raise DataError(f"OpenCV could not encode {path.name} as JPEG")
    # cv2.imwrite gives no reason for a failure, and does not accept every file name.
    path.write_bytes(encoded.tobytes())
