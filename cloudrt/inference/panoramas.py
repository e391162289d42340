"""Segmenting panoramas: tiles of all panoramas in the batches of one pipeline, and one result per panorama.

    files --decode threads--> panoramas -> tiles --Segmenter.infer--> levels -> blend --post-process threads--> results

The tiles of successive panoramas share batches. A run is resumed at a panorama whose first tile begins a batch, so that
all batches contain the same tiles as in a run without interruption.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import ImageError
from cloudrt.geo.blend import Blend
from cloudrt.geo.components import keep_components
from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.geo.positions import world_files
from cloudrt.geo.tiles import MORE_PIXELS, Panorama, Tile, open_panorama
from cloudrt.geo.tiling import Tiling, check_tiles
from cloudrt.images.image import ImageFile, StoredImage
from cloudrt.inference.model_source import require_rules
from cloudrt.inference.panorama_checks import Check
from cloudrt.inference.pipeline import Segmenter
from cloudrt.inference.results import Result
from cloudrt.labels import Labels
from cloudrt.masks.rule import Rule
from cloudrt.model.artifact import Artifact
from cloudrt.model.inferred import Inferred
from cloudrt.system.overlap import overlap

logger = logging.getLogger(__name__)

_MOST_AHEAD = 4
"""Maximum number of panoramas that are decoded, or whose components are found, ahead of the current one; each may take
gigabytes."""


@dataclass
class _Pending:
    """A panorama of which not all tiles have been segmented yet, or that failed.

    Parameters
    ----------
    file
        The file.
    tiles
        Its tiles; empty if it failed.
    place, beyond
        See `Panorama`.
    error
        Reason of the failure.
    blend
        Blended probabilities; None before the first tile.
    arrived
        Number of tiles that have been segmented.
    batch, batch_size
        See `Result`.
    """

    file: ImageFile | StoredImage
    tiles: Sequence[Tile]
    place: MaskGrid | None = None
    beyond: int | None = None
    error: str | None = None
    blend: Blend | None = None
    arrived: int = 0
    batch: int = 0
    batch_size: int = 0


def predict_panoramas(
    segmenter: Segmenter, files: Iterable[ImageFile | StoredImage], tiling: Tiling, checks: Iterable[Check] = ()
) -> Generator[Result, None, None]:
    """Yield one `Result` for each image, in order; see `Segmenter.predict`.

    Parameters
    ----------
    segmenter
        The open model.
    files
        The images, read lazily.
    tiling
        How to cut them.
    checks
        Called for each image, in order, before it is segmented.

    Raises
    ------
    ArtifactError, DataError
        The artifact has no rules, or images cannot be cut into tiles of its field of view; see `check_tiles`.
    """
    artifact = segmenter.artifact
    require_rules(artifact, segmenter.model)
    check_tiles(artifact, tiling)
    threads = segmenter.threads
    ahead = min(threads, _MOST_AHEAD) + 1
    pending: deque[_Pending] = deque()
    with (
        ThreadPoolExecutor(threads, "panoramas") as openers,
        ThreadPoolExecutor(threads, "panorama-results") as finishers,
        ThreadPoolExecutor(threads, "components") as classes,
    ):
        limit = segmenter.options.max_pixels * MORE_PIXELS
        try:
            opened = overlap(openers, partial(_open, artifact, tiling, limit), files, ahead)
            with closing(segmenter.infer(_tiles(opened, pending, list(checks)))) as tiles:
                blended = _blend(segmenter, tiles, pending, tiling)
                yield from overlap(
                    finishers, partial(_finish, classes, artifact.labels, artifact.rules), blended, ahead
                )
        finally:  # after an error or an early close, cancel the tasks that have not started
            for pool in (openers, finishers, classes):
                pool.shutdown(wait=False, cancel_futures=True)


def _open(
    artifact: Artifact, tiling: Tiling, max_pixels: int, file: ImageFile | StoredImage
) -> tuple[ImageFile | StoredImage, Panorama | str]:
    """Return a file and its panorama, or the reason of the failure."""
    try:
        with _as_file(file) as path:
            return file, open_panorama(path, artifact, tiling, max_pixels)
    except ImageError as error:
        return file, str(error)


@contextmanager
def _as_file(file: ImageFile | StoredImage) -> Iterator[Path]:
    """Yield the path of a file; that of a temporary copy, with its world file, if the image is in a store."""
    if isinstance(file, ImageFile):
        yield file.path
        return
    with TemporaryDirectory() as folder:
        path = Path(folder, PurePosixPath(file.key).name)
        content = file.read()
        if not isinstance(content, bytes):
            raise ImageError("is an array: only the bytes of an image file can be cut into tiles")
        path.write_bytes(content)
        beside = file.beside or (lambda _: None)
        for world in world_files(path):
            found = beside(world.suffix)
            if found is not None:
                world.write_bytes(found)
                break
        yield path


def _tiles(
    opened: Iterable[tuple[ImageFile | StoredImage, Panorama | str]], pending: deque[_Pending], checks: Sequence[Check]
) -> Iterator[StoredImage]:
    """Yield the tiles of all panoramas, and append each panorama to `pending`."""
    announcements = Announcements()
    for file, opening in opened:
        error = opening if isinstance(opening, str) else _refusal(file, opening, checks)
        if error is not None or isinstance(opening, str):
            pending.append(_Pending(file, (), error=error))
            continue
        announcements.add(file.key, opening.place)
        pending.append(_Pending(file, opening.tiles, opening.place, opening.beyond))
        for tile in opening.tiles:  # cut by the decoding threads
            yield StoredImage(file.key, partial(opening.cut, tile))


def _refusal(file: ImageFile | StoredImage, panorama: Panorama, checks: Sequence[Check]) -> str | None:
    try:
        for check in checks:
            check.check(file.key, panorama.place)
    except ImageError as error:
        return str(error)
    return None


class Announcements:
    """Logs the position of the first panorama of each source of positions, such as "file name"."""

    def __init__(self) -> None:
        self._sources: set[str] = set()

    def add(self, key: str, place: MaskGrid) -> None:
        """Add a panorama."""
        position = place.position
        source = position.source if position else ""
        if source in self._sources:
            return
        self._sources.add(source)
        if position is None:
            logger.info("%s: no position", key)
            return
        west, south, east, north = position.bounds(place.grid)
        where = f"{west:g} to {east:g}, {south:g} to {north:g} ({position.crs})"
        logger.info("%s: position from its %s: %s", key, source, where)


def _blend(
    segmenter: Segmenter, tiles: Iterator[Inferred], pending: deque[_Pending], tiling: Tiling
) -> Iterator[tuple[_Pending, NDArray[np.uint8] | None]]:
    """Yield each panorama, in order, with its levels, (C, W, H), or None if it failed."""
    start, size = 0, 0  # position and batch size of the last panorama whose first tile begins a batch
    position = 0  # of the current panorama
    artifact = segmenter.artifact

    def failed() -> Iterator[tuple[_Pending, None]]:
        nonlocal position
        while pending and not pending[0].tiles:
            one = pending.popleft()
            yield replace(one, batch=start, batch_size=size), None
            position += 1

    for number, inferred in enumerate(tiles):
        yield from failed()
        one = pending[0]
        if not one.arrived and one.place is not None:
            if inferred.batch == number:
                start, size = position, inferred.batch_size
            one.batch, one.batch_size = start, size
            grid, tile = one.place.grid, artifact.labels.submit_grid
            one.blend = Blend(grid, tile, len(artifact.rules), tiling.overlap, one.beyond)
        if inferred.error is not None or inferred.probability is None:
            one.error = inferred.error
        elif one.blend is not None:
            place = one.tiles[one.arrived]
            present = _present(inferred.probability, inferred.presence, artifact.rules)
            one.blend.add(inferred.probability, place.grid_x, place.grid_y, present)
        one.arrived += 1
        if one.arrived == len(one.tiles):
            pending.popleft()
            position += 1
            blend, one.blend = one.blend, None
            yield one, None if one.error is not None or blend is None else blend.finish()
    yield from failed()


def _present(levels: NDArray[np.uint8], presence: NDArray[np.uint8] | None, rules: Sequence[Rule]) -> NDArray[np.bool_]:
    """Return (C,) bool: the classes of a tile that pass the presence and the gate of their rule.

    `levels` is (C, W, H).
    """
    return np.array(
        [
            (presence is None or presence[index] >= rule.presence)
            and (rule.gate_pixels == 0 or np.count_nonzero(levels[index] > rule.gate_threshold) >= rule.gate_pixels)
            for index, rule in enumerate(rules)
        ]
    )


def _finish(
    classes: ThreadPoolExecutor, labels: Labels, rules: Sequence[Rule], item: tuple[_Pending, NDArray[np.uint8] | None]
) -> Result:
    one, levels = item
    if levels is None or one.place is None:
        empty = dict.fromkeys(labels.classes, "")
        error = one.error or "was not segmented"
        return Result(one.file.key, empty, error, labels, batch=one.batch, batch_size=one.batch_size)
    texts, means = zip(*classes.map(partial(keep_components, wraps=one.place.wraps), levels, rules), strict=True)
    place = replace(one.place, means=means)
    return Result(
        image=one.file.key,
        rle=dict(zip(labels.classes, texts, strict=True)),
        error=None,
        labels=place.labels(labels),
        batch=one.batch,
        batch_size=one.batch_size,
        place=place,
    )
