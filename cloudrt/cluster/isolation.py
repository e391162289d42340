"""Images that do harm: found without losing the others of their partition.

An image that makes decoding or segmenting raise, or ends the whole process, fails alone. The `Ledger`, an actor that
outlives the workers, knows what each was at when it died; the next one goes more carefully:

    whole partition --died--> batch after batch --died--> the images of that batch alone --died--> that image failed
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np

from cloudrt.cluster.partitions import Image
from cloudrt.cluster.storage import StorageError
from cloudrt.errors import CloudrtError
from cloudrt.images.decoding import Input
from cloudrt.inference.identity import Identity
from cloudrt.inference.journal import Record
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
"""What decoding, engine and post-processing may raise of an image."""


class Predictor(Protocol):
    """What a worker needs of a `Segmenter`."""

    @property
    def batch_size(self) -> int:
        """Images a batch."""
        ...

    @property
    def labels(self) -> Labels:
        """Classes and grids."""
        ...

    def predict(self, inputs: Iterable[Input]) -> Iterator[Result]:
        """Yield a result for each input, in order."""
        ...

    def identity(self) -> Identity:
        """What the answers hang on."""
        ...


@dataclass(frozen=True)
class Care:
    """How carefully a partition is to be gone through.

    Parameters
    ----------
    careful
        Batch after batch, with a note before each.
    alone
        Positions to be run one after another.
    blamed
        Positions of images that ended a worker.
    done
        What came of the partition, where it is finished already.
    """

    careful: bool = False
    alone: frozenset[int] = frozenset()
    blamed: frozenset[int] = frozenset()
    done: Mapping[str, Any] | None = None


class Ledger:
    """What each worker is at, kept where it outlives them; one for a run.

    Parameters
    ----------
    model
        The artifact's bytes, for machines that join the cluster late.
    """

    def __init__(self, model: bytes = b"") -> None:
        self._model = model
        self._care: dict[int, Care] = {}
        self._at: dict[int, frozenset[int]] = {}

    def model(self) -> bytes:
        """Return the artifact."""
        return self._model

    def begin(self, partition: int) -> Care:
        """A worker takes up a partition; one that was begun and not finished has ended its worker."""
        care = self._care.get(partition)
        if care is None:
            care = Care()
        elif care.done is None:
            at = self._at.pop(partition, frozenset())
            blame = care.blamed | at if len(at) == 1 else care.blamed
            care = Care(True, care.alone | (at if len(at) > 1 else frozenset()), blame)
        self._care[partition] = care
        return care

    def note(self, partition: int, positions: Sequence[int]) -> None:
        """A worker turns to these images."""
        self._at[partition] = frozenset(positions)

    def finish(self, partition: int, done: Mapping[str, Any]) -> None:
        """A partition is written."""
        self._care[partition] = Care(done=done)
        self._at.pop(partition, None)


def segment(
    predictor: Predictor,
    images: Sequence[Image],
    inputs: Sequence[Input],
    care: Care,
    note: Callable[[Sequence[int]], object],
) -> list[Record]:
    """Return the rows of images; one that raises, or that is blamed, fails alone.

    Parameters
    ----------
    note
        Called with the positions of the images that are run next, where care is asked for.

    Raises
    ------
    StorageError
        The store does not answer.
    CloudrtError
        The engine itself does not work any more.
    """
    if not care.careful:
        try:
            return _records(images, predictor.predict(inputs))
        except StorageError:
            raise
        except FAULTS as error:
            logger.warning("a partition is run again, batch after batch: %s", error)
    done: dict[int, Record] = {}
    for begin in range(0, len(images), predictor.batch_size):
        group = range(begin, min(begin + predictor.batch_size, len(images)))
        sound = [position for position in group if position not in care.blamed]
        if not care.alone.intersection(sound):
            try:
                note(sound)
                found = _records([images[i] for i in sound], predictor.predict([inputs[i] for i in sound]))
                done |= dict(zip(sound, found, strict=True))
                continue
            except StorageError:
                raise
            except FAULTS as error:
                logger.warning("a batch is run again, image after image: %s", error)
        for position in sound:
            note([position])
            done[position] = _alone(predictor, images[position], inputs[position])
    empty = ("",) * len(predictor.labels.classes)
    ended = "ends the process that decodes or segments it"
    return [done.get(i) or Record(image.key, empty, ended, 0) for i, image in enumerate(images)]


def _alone(predictor: Predictor, image: Image, source: Input) -> Record:
    try:
        return _records([image], predictor.predict([source]))[0]
    except StorageError:
        raise
    except FAULTS as error:
        black = np.zeros((*predictor.labels.submit_grid, 3), np.uint8)
        list(predictor.predict([black]))  # raises where it is not the image that is at fault
        reason = (str(error).splitlines() or [""])[0]
        return Record(image.key, ("",) * len(predictor.labels.classes), f"cannot be segmented: {reason}", 0)


def _records(images: Sequence[Image], results: Iterable[Result]) -> list[Record]:
    return [
        Record(image.key, tuple(result.rle.values()), result.error, 0)
        for image, result in zip(images, results, strict=True)
    ]
