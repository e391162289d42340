"""Isolate images that crash workers, so that the other images of their partition are not lost.

If an image raises an error during decoding or segmentation, or crashes the process, only that image fails. The
`Ledger`, an actor that outlives the workers, records which images each worker is running. After a crash, the partition
runs again in smaller steps:

    whole partition --crash--> batch by batch --crash--> images of that batch one by one --crash--> that image failed
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np

from cloudrt.cluster.listing import ListedImage
from cloudrt.cluster.nodes import ClusterError
from cloudrt.cluster.storage_errors import StorageError
from cloudrt.errors import CloudrtError
from cloudrt.images.decoding import Input
from cloudrt.inference.identity import Identity
from cloudrt.inference.journal_records import Record
from cloudrt.inference.results import Result
from cloudrt.labels import Labels

logger = logging.getLogger(__name__)

FAULTS = (
    CloudrtError,
    cv2.error,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    MemoryError,
    OSError,
    AssertionError,
)
"""Errors that decoding, engine and post-processing can raise for an image."""
MOST_LOST = 5
"""Largest number of workers that may die on a partition while none of its images runs, for example
because machines are removed from the cluster."""


class Predictor(Protocol):
    """The part of `Segmenter` that a worker uses."""

    @property
    def batch_size(self) -> int:
        """Images per batch."""
        ...

    @property
    def labels(self) -> Labels:
        """Classes and grids."""
        ...

    def predict(self, inputs: Iterable[Input]) -> Iterator[Result]:
        """Yield a result for each input, in order."""
        ...

    def identity(self) -> Identity:
        """Everything that results depend on."""
        ...


@dataclass(frozen=True)
class PartitionState:
    """State of a partition after crashes, and how to run it.

    Parameters
    ----------
    by_batch
        Whether to run batch by batch, and to record each batch before it runs, because a worker died on the partition.
    one_by_one
        Positions of images to run one by one, because a worker died on their batch.
    crashed
        Positions of images that crashed a worker.
    done
        Counts of the partition if it is finished.
    lost
        Number of workers that died while none of the images ran, not counting the first worker.
    """

    by_batch: bool = False
    one_by_one: frozenset[int] = frozenset()
    crashed: frozenset[int] = frozenset()
    done: Mapping[str, Any] | None = None
    lost: int = 0


class Ledger:
    """Records what each worker is running; one actor per run, which outlives the workers.

    Parameters
    ----------
    model
        Bytes of the artifact, for machines that join the cluster late.
    """

    def __init__(self, model: bytes = b"") -> None:
        self._model = model
        self._states: dict[int, PartitionState] = {}
        self._running: dict[int, frozenset[int]] = {}

    def model(self) -> bytes:
        """Return the artifact."""
        return self._model

    def begin(self, partition: int) -> PartitionState:
        """Record that a worker starts a partition. If it was started before and not finished, its worker died.

        Raises
        ------
        ClusterError
            More than `MOST_LOST` workers died on the partition while none of its images ran.
        """
        state = self._states.get(partition)
        if state is None:
            state = PartitionState()
        elif state.done is None:
            running = self._running.pop(partition, frozenset())
            one = len(running) == 1
            lost = state.lost + (state.by_batch and not running)
            if lost > MOST_LOST:
                raise ClusterError(
                    f"partition {partition}: {lost} workers were lost before or after its images ran, such as while "
                    "they wrote its rows: see the logs of Ray, then run again with --resume"
                )
            state = PartitionState(
                by_batch=True,
                lost=lost,
                one_by_one=state.one_by_one if one else state.one_by_one | running,
                crashed=state.crashed | running if one else state.crashed,
            )
        self._states[partition] = state
        return state

    def note(self, partition: int, positions: Sequence[int]) -> None:
        """Record that a worker starts these images; none if it has finished all images of the partition."""
        self._running[partition] = frozenset(positions)

    def finish(self, partition: int, done: Mapping[str, Any]) -> None:
        """Record that a partition is written."""
        self._states[partition] = PartitionState(done=done)
        self._running.pop(partition, None)


def segment(
    predictor: Predictor,
    images: Sequence[ListedImage],
    inputs: Sequence[Input],
    state: PartitionState,
    note: Callable[[Sequence[int]], object],
) -> list[Record]:
    """Return the rows of a partition; images that raise an error or crashed a worker fail, the others do not.

    Parameters
    ----------
    predictor
        Segments the images.
    images, inputs
        The images, and the same as inputs of the predictor.
    state
        How to run the partition.
    note
        Called with the positions of the images that run next, and with none after the last one; not called if the whole
        partition runs at once.

    Raises
    ------
    StorageError
        The store does not answer.
    CloudrtError
        The engine has stopped working.
    """
    if not state.by_batch:
        try:
            return _records(images, predictor.predict(inputs))
        except StorageError:
            raise
        except FAULTS as error:
            logger.warning("running a partition again, batch by batch: %s", error)
    done: dict[int, Record] = {}
    for begin in range(0, len(images), predictor.batch_size):
        group = range(begin, min(begin + predictor.batch_size, len(images)))
        sound = [position for position in group if position not in state.crashed]
        if sound and not state.one_by_one.intersection(sound):
            try:
                note(sound)
                found = _records([images[i] for i in sound], predictor.predict([inputs[i] for i in sound]))
                done |= dict(zip(sound, found, strict=True))
                continue
            except StorageError:
                raise
            except FAULTS as error:
                logger.warning("running a batch again, one image at a time: %s", error)
        for position in sound:
            note([position])
            done[position] = _alone(predictor, images[position], inputs[position])
    note([])  # a worker that dies from here on did not die on an image
    empty = ("",) * len(predictor.labels.classes)
    ended = "crashes the process that decodes or segments it"
    return [done.get(i) or Record(image.key, empty, ended, 0) for i, image in enumerate(images)]


def _alone(predictor: Predictor, image: ListedImage, source: Input) -> Record:
    try:
        return _records([image], predictor.predict([source]))[0]
    except StorageError:
        raise
    except FAULTS as error:
        black = np.zeros((*predictor.labels.submit_grid, 3), np.uint8)
        list(predictor.predict([black]))  # raises if the engine is at fault, not the image
        reason = (str(error).splitlines() or [""])[0]
        return Record(image.key, ("",) * len(predictor.labels.classes), f"cannot be segmented: {reason}", 0)


def _records(images: Sequence[ListedImage], results: Iterable[Result]) -> list[Record]:
    return [
        Record(image.key, tuple(result.rle.values()), result.error, 0, place=result.place)
        for image, result in zip(images, results, strict=True)
    ]
