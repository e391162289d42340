"""Panoramas on a cluster: segmented whole by one worker each, and checked against each other while they are merged.

partition of panoramas --PanoramaPredictor--> rows, grids and positions --checked--> rows, or failures
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np

from cloudrt.cluster.listing import ListedImage
from cloudrt.cluster.partitions import Partitions
from cloudrt.errors import DataError, ImageError
from cloudrt.geo.tiling import Tiling, check_tiles
from cloudrt.images.decoding import Input
from cloudrt.images.image import ImageFile, StoredImage
from cloudrt.inference.identity import Identity
from cloudrt.inference.journal_records import Record
from cloudrt.inference.panorama_checks import Check, panorama_checks
from cloudrt.inference.panoramas import Announcements, predict_panoramas
from cloudrt.inference.results import Result
from cloudrt.inference.submission import read_run_record
from cloudrt.inference.task import InferTask
from cloudrt.labels import Labels
from cloudrt.model.artifact import Artifact

if TYPE_CHECKING:
    from cloudrt.inference.pipeline import Segmenter


@dataclass(frozen=True)
class PanoramaPredictor:
    """A `Predictor` of panoramas. An array, with which `isolation` tests the engine, is not cut into tiles."""

    segmenter: Segmenter
    tiling: Tiling

    @property
    def batch_size(self) -> int:
        """Tiles per batch."""
        return self.segmenter.batch_size

    @property
    def labels(self) -> Labels:
        """Classes and grids."""
        return self.segmenter.labels

    def predict(self, inputs: Iterable[Input]) -> Iterator[Result]:
        """Yield a result for each panorama, in order."""
        some = list(inputs)
        if all(isinstance(one, np.ndarray) for one in some):
            return self.segmenter.predict(some)
        return predict_panoramas(self.segmenter, cast(list[ImageFile | StoredImage], some), self.tiling)

    def identity(self) -> Identity:
        """Everything that results depend on."""
        return self.segmenter.identity()


def prepare_checks(task: InferTask, artifact: Artifact, images: Sequence[ListedImage]) -> Callable[[], Sequence[Check]]:
    """Check packages, tiles and the Zarr store; return a function that creates the checks of a merge.

    Raises
    ------
    DataError
        See `check_tiles` and `panorama_checks`.
    ModuleNotFoundError
        A package that the run needs is not installed.
    """
    task.require_packages(image.key for image in images)
    if task.tiling is not None:
        check_tiles(artifact, task.tiling)
    checks = partial(panorama_checks, task, artifact.labels.classes)
    checks()
    return checks


def checked(
    records: Callable[[], Iterator[Record]], checks: Callable[[], Sequence[Check]]
) -> Callable[[], Iterator[Record]]:
    """Return a function that yields the rows; panoramas that a check refuses fail, as on a single machine."""
    announcements = Announcements()

    def these() -> Iterator[Record]:
        some = checks()
        for record in records():
            error = None
            if record.place is not None:
                try:
                    for check in some:
                        check.check(record.key, record.place)
                    announcements.add(record.key, record.place)
                except ImageError as refused:
                    error = str(refused)
            yield record if error is None else Record(record.key, ("",) * len(record.texts), error, 0)

    return these


def are_appended(partitions: Partitions, task: InferTask) -> bool:
    """Return whether the Zarr store already has the rows of these partitions, whose files can then be overwritten."""
    if task.format != "zarr" or task.resume:
        return False
    try:
        return read_run_record(task.paths) == partitions.recorded()
    except DataError:
        return False
