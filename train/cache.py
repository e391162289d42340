"""Dataset cache: images decoded and resized once, truth as packed bits on the submission grid.

    images.npy  (N, H, W, 3) uint8, RGB
    truth.npy   (N, C, ceil(W_out * H_out / 8)) uint8: masks packed in RLE order
    index.json  names of the images, and the error of each unreadable one

The arrays are memory-mapped, so that a data set may be larger than memory. Each file has its SHA-256 beside it; a cache
that differs from them is built again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloudrt.data.folder import DataFolder
from cloudrt.errors import DataError, ImageError
from cloudrt.images.image import load_image
from cloudrt.labels import Grid
from cloudrt.system.cache import cache_folder, mark_used, prune, remove_damaged, seal
from cloudrt.system.files import partial_path, remove_leftovers, reserve

CACHE_FORMAT = 1
FILES = ("images.npy", "truth.npy", "index.json")


@dataclass(frozen=True)
class DatasetCache:
    """An open cache; `images` and `truth` are memory-mapped."""

    names: list[str]
    images: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    failures: dict[str, str]


def open_cache(
    data: DataFolder,
    input_size: Grid,
    root: Path,
    limit: int = 0,
    advance: Callable[[int], object] | None = None,
) -> DatasetCache:
    """Open the cache of a data set below `root`; build it if it is missing or damaged, or the data has changed.

    Parameters
    ----------
    data
        The data set.
    input_size
        Height and width of the cached images.
    root
        Folder of all caches.
    limit
        Number of images, from the start of train.csv; 0 for all.
    advance
        Called with 1 after each image while the cache is built.

    Raises
    ------
    DataError
        train.csv is malformed or has an invalid RLE, fewer than two images are readable, or the disk has no space.
    """
    rows = data.read_train()
    names = list(rows)[: limit or None]
    if not names:
        raise DataError(f"{data.train_csv} has no rows")
    folder = root / _fingerprint(data, input_size, names)
    files = [folder / name for name in FILES]
    remove_leftovers(root)
    remove_damaged(file for file in files if file.is_file())
    if not all(file.is_file() for file in files):
        _build(data, {name: rows[name] for name in names}, input_size, folder, advance)
    mark_used(folder)
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    images = np.load(folder / "images.npy", mmap_mode="r")
    truth = np.load(folder / "truth.npy", mmap_mode="r")
    return DatasetCache(index["names"], images, truth, index["failures"])


def _fingerprint(data: DataFolder, input_size: Grid, names: list[str]) -> str:
    """Return a folder name that identifies everything the cache depends on."""
    digest = hashlib.sha256(data.train_csv.read_bytes())
    parts: list[object] = [CACHE_FORMAT, input_size, data.labels.to_dict(), str(data.root.resolve())]
    for name in names:
        try:
            status = (data.train_images / name).stat()
            parts.append((name, status.st_size, status.st_mtime_ns))
        except (OSError, ValueError):  # ValueError: not a valid file name
            parts.append((name, "missing"))
    digest.update(json.dumps(parts).encode())
    return f"{data.root.resolve().name}-{input_size[1]}x{input_size[0]}-{digest.hexdigest()[:16]}"


def _build(
    data: DataFolder,
    rows: dict[str, dict[str, str]],
    input_size: Grid,
    folder: Path,
    advance: Callable[[int], object] | None,
) -> None:
    grid = data.labels.submit_grid
    bits = (len(data.labels.classes), (grid[0] * grid[1] + 7) // 8)
    wanted = len(rows) * (input_size[0] * input_size[1] * 3 + bits[0] * bits[1])
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.parent == cache_folder("datasets"):  # never prune a folder that the user named
        prune("datasets", reserve=wanted)
    free = shutil.disk_usage(folder.parent).free
    if wanted > free:
        raise DataError(
            f"the dataset cache needs {wanted / 1e9:.1f} GB, but {folder.parent} has {free / 1e9:.1f} GB free: "
            "choose another folder with --cache"
        )
    partial = partial_path(folder)
    try:
        partial.mkdir()
        images = np.lib.format.open_memmap(
            partial / "images.npy", "w+", dtype=np.uint8, shape=(len(rows), *input_size, 3)
        )
        truth = np.lib.format.open_memmap(partial / "truth.npy", "w+", dtype=np.uint8, shape=(len(rows), *bits))
        for name in ("images.npy", "truth.npy"):
            with (partial / name).open("r+b") as file:
                reserve(file.fileno())
        failures: dict[str, str] = {}
        names = list(rows)

        def fill(position: int) -> None:
            name = names[position]
            truth[position] = data.truth_bits(name, rows[name])
            try:
                images[position] = load_image(data.train_images / name, input_size)
            except ImageError as error:
                failures[name] = str(error)

        with ThreadPoolExecutor() as pool:
            for _ in pool.map(fill, range(len(names))):
                if advance:
                    advance(1)
        if len(names) - len(failures) < 2:
            first = next((f", first {name}: {reason}" for name, reason in failures.items()), "")
            raise DataError(
                f"training needs at least two readable images; {data.train_csv} lists {len(names)}, of which "
                f"{len(failures)} cannot be read from {data.train_images}{first}"
            )
        images.flush()
        truth.flush()
        ordered = {name: failures[name] for name in names if name in failures}
        (partial / "index.json").write_text(json.dumps({"names": names, "failures": ordered}), encoding="utf-8")
        seal(partial / name for name in FILES)
        _publish(partial, folder)
    except OSError as error:
        error.filename = str(folder.parent)  # instead of the partial folder, which is removed
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, folder: Path) -> None:
    """Rename a complete cache to `folder`, unless another process, which may be reading it, has built the same one."""

    def is_built() -> bool:
        return all((folder / name).is_file() for name in FILES)

    if is_built():
        return
    if folder.exists():  # the rest of a damaged cache
        shutil.rmtree(folder)
    try:
        partial.rename(folder)
    except OSError:  # another process may have built it after the check
        if not is_built():
            raise
