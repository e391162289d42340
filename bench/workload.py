"""The workload of a benchmark: an open model, the images, and the model's outputs for them.

The images are the user's, or synthetic images of the size of the competition's images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.data.scenes import draw_scene
from cloudrt.data.synth import write_jpeg
from cloudrt.errors import DataError, ImageError
from cloudrt.images.image import Image, ImageFile, find_images, load_image
from cloudrt.inference.pipeline import Segmenter
from cloudrt.labels import LABEL_GRID, Grid, Labels
from cloudrt.masks.rule import Rule
from cloudrt.model.artifact import Artifact
from cloudrt.options import GPU_PROVIDERS
from cloudrt.system.machine import usable_cpus
from cloudrt.system.progress import ProgressBar

IMAGES = 6

Maps = list[tuple[NDArray[np.uint8], NDArray[np.uint8] | None]]
"""For each image, the artifact's probability (C, W, H) and its presence (C,) or None."""


@dataclass(frozen=True)
class Workload:
    """An open model and its images.

    Parameters
    ----------
    segmenter
        The model.
    files
        The images.
    loaded
        The images decoded at the network's input size.
    maps
        The model's outputs for `loaded`.
    folder
        For temporary files.
    """

    segmenter: Segmenter
    files: Sequence[ImageFile]
    loaded: Sequence[Image]
    maps: Maps
    folder: Path

    @property
    def artifact(self) -> Artifact:
        """Metadata of the model."""
        return self.segmenter.artifact

    @property
    def labels(self) -> Labels:
        """Classes and grids."""
        return self.artifact.labels

    @property
    def rules(self) -> tuple[Rule, ...]:
        """One rule per class."""
        return self.artifact.rules

    @property
    def on_gpu(self) -> bool:
        """Whether the engine runs on a GPU."""
        return self.segmenter.plan.provider in GPU_PROVIDERS


def make_workload(segmenter: Segmenter, files: Sequence[ImageFile], folder: Path) -> Workload:
    """Decode the images and run the model on them."""
    loaded = [load(segmenter, file) for file in files]
    return Workload(segmenter, files, loaded, infer(segmenter, loaded), folder)


def load(segmenter: Segmenter, file: ImageFile) -> Image:
    """Decode an image at the network's input size, within the limit of pixels of the run."""
    return load_image(file.path, segmenter.artifact.input_size, segmenter.options.max_pixels)


def infer(segmenter: Segmenter, images: Sequence[Image]) -> Maps:
    """Run the engine on batches, the last one padded, with as many concurrent batches as in the pipeline."""
    size = segmenter.batch_size
    batches = [images[begin : begin + size] for begin in range(0, len(images), size)]
    maps: Maps = []
    with ThreadPoolExecutor(segmenter.pool.slots) as streams:
        for chosen, (probability, presence) in zip(batches, streams.map(segmenter.pool.run, batches), strict=True):
            maps += [(probability[i], None if presence is None else presence[i]) for i in range(len(chosen))]
    return maps


def open_images(
    data: Path | None, max_images: int, segmenter: Segmenter, folder: Path, progress: ProgressBar
) -> tuple[list[ImageFile], dict[str, Any]]:
    """Return the images, evenly spaced over the folder, and their description for bench.json.

    Images that cloudrt or OpenCV cannot read are skipped and counted.

    Parameters
    ----------
    data
        Folder of images; None writes synthetic images below `folder`.
    max_images
        Maximum number of images. 0 takes `IMAGES`, or more to fill whole batches.
    segmenter
        The model, which sets batch size and input size.
    folder
        For the scenes.
    progress
        Shows the drawing of the scenes.

    Raises
    ------
    DataError
        No image can be read.
    """
    count = max_images or -(-IMAGES // segmenter.batch_size) * segmenter.batch_size
    if data is None:
        with progress("Drawing scenes", count) as advance:
            files = draw_scenes(folder / "scenes", count, advance)
        return files, {"count": len(files), "size": list(LABEL_GRID), "source": "synthetic images", "unreadable": 0}
    found = find_images(data)
    chosen = [found[i] for i in np.unique(np.linspace(0, len(found) - 1, count).astype(int))]
    sizes = {file: size for file in chosen if (size := _readable(file, segmenter))}
    if not sizes:
        raise DataError(f"{data}: none of {len(chosen)} images can be read: cloudrt-infer {data} reports the reasons")
    size = np.median(list(sizes.values()), axis=0).astype(int).tolist()
    skipped = len(chosen) - len(sizes)
    return list(sizes), {"count": len(sizes), "size": size, "source": "given images", "unreadable": skipped}


def repeat_images(files: Sequence[ImageFile], count: int) -> list[ImageFile]:
    """Return `count` images with different keys, the given ones repeated."""
    return [ImageFile(f"{number}-{file.key}", file.path) for number, file in enumerate(islice(cycle(files), count))]


def draw_scenes(folder: Path, count: int, advance: Callable[[], object], size: Grid = LABEL_GRID) -> list[ImageFile]:
    """Write synthetic images as JPEG files, by default of the size of the competition's images."""
    folder.mkdir()

    def draw(seed: int) -> ImageFile:
        path = folder / f"scene-{seed:03d}.jpg"
        write_jpeg(path, draw_scene(seed, size).image)
        return ImageFile(path.name, path)

    files = []
    with ThreadPoolExecutor(min(usable_cpus(), 8)) as pool:
        for file in pool.map(draw, range(count)):
            files.append(file)
            advance()
    return files


def _readable(file: ImageFile, segmenter: Segmenter) -> tuple[int, int] | None:
    """Return the size of an image, or None if cloudrt or OpenCV cannot read it."""
    try:
        load(segmenter, file)
    except ImageError:
        return None
    whole = cv2.imread(str(file.path))
    return None if whole is None else (whole.shape[0], whole.shape[1])
