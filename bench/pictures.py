"""What the bench works on: the user's images, or made-up scenes of the size of the competition's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cloudrt.data.scenes import draw_scene
from cloudrt.data.synth import JPEG_QUALITY
from cloudrt.errors import DataError, ImageError
from cloudrt.images.image import ImageFile, find_images, load_image
from cloudrt.inference.pipeline import Segmenter
from cloudrt.labels import LABEL_GRID
from cloudrt.system.machine import usable_cpus

IMAGES = 6

Progress = Callable[[str, int], AbstractContextManager[Callable[[], object]]]
"""Opens a bar with a description and a total; what it gives is called once for each step done."""


def open_images(
    data: Path | None, most: int, segmenter: Segmenter, folder: Path, progress: Progress
) -> tuple[list[ImageFile], dict[str, Any]]:
    """Return the images, evenly spaced over the folder, and what there is to say of them.

    Images that either way cannot read are left out, and counted.

    Parameters
    ----------
    data
        The folder; made-up scenes, written below `folder`, where it is None.
    most
        At most so many; 0 is `IMAGES` or more, so that they fill whole batches.
    """
    most = most or -(-IMAGES // segmenter.batch_size) * segmenter.batch_size
    if data is None:
        with progress("Drawing scenes", most) as advance:
            files = draw_scenes(folder / "scenes", most, advance)
        return files, {"count": len(files), "size": list(LABEL_GRID), "source": "made-up scenes", "unreadable": 0}
    found = find_images(data)
    chosen = [found[i] for i in np.unique(np.linspace(0, len(found) - 1, most).astype(int))]
    sizes = {file: size for file in chosen if (size := _readable(file, segmenter))}
    if not sizes:
        raise DataError(f"{data}: none of {len(chosen)} images can be read: cloudrt-infer {data} says why of each")
    size = np.median(list(sizes.values()), axis=0).astype(int).tolist()
    count = {"count": len(sizes), "size": size, "source": "given images", "unreadable": len(chosen) - len(sizes)}
    return list(sizes), count


def draw_scenes(folder: Path, count: int, advance: Callable[[], object]) -> list[ImageFile]:
    """Write made-up scenes as JPEG, of the size of the competition's images."""
    folder.mkdir()

    def draw(seed: int) -> ImageFile:
        bgr = cv2.cvtColor(draw_scene(seed, LABEL_GRID).image, cv2.COLOR_RGB2BGR)
        path = folder / f"scene-{seed:03d}.jpg"
        path.write_bytes(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes())
        return ImageFile(path.name, path)

    files = []
    with ThreadPoolExecutor(min(usable_cpus(), 8)) as pool:
        for file in pool.map(draw, range(count)):
            files.append(file)
            advance()
    return files


def _readable(file: ImageFile, segmenter: Segmenter) -> tuple[int, int] | None:
    """Return the size of an image that both ways can read, None where one cannot."""
    try:
        load_image(file.path, segmenter.artifact.input_size, segmenter.max_pixels)
    except ImageError:
        return None
    whole = cv2.imread(str(file.path))
    return None if whole is None else (whole.shape[0], whole.shape[1])


@contextmanager
def silent(_description: str, _total: int) -> Iterator[Callable[[], object]]:
    """A `Progress` that shows nothing."""
    yield lambda: None
