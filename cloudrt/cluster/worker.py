"""One worker: an actor with an engine of its own, on a GPU or a group of cores. A partition in, a file of rows out.

    keys and places --Segmenter.predict: decode threads -> engine -> post-process threads--> rows --> part-00000.parquet

Decoding, engine and post-processing are the threads of `cloudrt.pipeline`, in one process. An image that makes them
raise, or that ends the whole process, must not take its partition with it. The `Ledger`, an actor elsewhere, knows what
a worker was at when it died; the next one goes more carefully:

    whole partition --died--> batch after batch --died--> the images of that batch alone --died--> that image failed
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from cloudrt.cluster.partitions import Image, Partitions, unpack
from cloudrt.cluster.storage import Place, StorageError
from cloudrt.decoding import Input
from cloudrt.engines.plan import Plan
from cloudrt.errors import ArtifactError, CloudrtError, DataError, ProviderError
from cloudrt.files import replacing, sha256
from cloudrt.journal import Identity, Record
from cloudrt.labels import Labels
from cloudrt.results import Result

logger = logging.getLogger(__name__)

FAULTS = (CloudrtError, cv2.error, RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError,
          MemoryError, OSError, AssertionError)  # fmt: skip
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

    def identity(self) -> dict[str, str | int]:
        """What the answers hang on."""
        ...


@dataclass(frozen=True)
class Job:
    """What every worker is told.

    Parameters
    ----------
    name, sha256
        Of the artifact, which every machine keeps; see `keep_model`.
    plan
        How to run it; None leaves provider and batch to be chosen as `provider`, `batch_size` and `compute` ask.
    threads, max_pixels, allow_cpu, decoder
        See `Segmenter`.
    stores
        Where the images lie.
    out, form
        Where the rows go, and as what.
    identity
        That every worker must have; None asks nothing.
    """

    name: str
    sha256: str
    threads: int
    max_pixels: int
    provider: str = "auto"
    batch_size: int = 0
    compute: str = "auto"
    allow_cpu: bool = False
    decoder: str = "cpu"
    plan: Plan | None = None
    stores: tuple[Place, ...] = ()
    out: Place | None = None
    form: str = "parquet"
    identity: Mapping[str, str | int] | None = field(default=None, repr=False)

    def settled(self, plan: Plan, identity: Identity, stores: Sequence[Place], out: Place, form: str) -> Job:
        """Return the job whose answers are fixed."""
        return replace(self, plan=plan, identity=identity, stores=tuple(stores), out=out, form=form)

    def open(self) -> Predictor:
        """Return a `Segmenter` of it on this machine.

        Raises
        ------
        CloudrtError
            The artifact cannot be kept here; the provider cannot run; another identity than that of the run.
        """
        from cloudrt.pipeline import Segmenter

        segmenter = Segmenter(
            self.model, self.provider, batch_size=self.batch_size, threads=self.threads,
            max_pixels=self.max_pixels, compute=self.compute, allow_cpu=self.allow_cpu, decoder=self.decoder,
            plan=self.plan,
        )  # fmt: skip
        if self.identity is not None:
            differences = [
                f"{name} is {value} there and {self.identity.get(name, 'none')} in this run"
                for name, value in segmenter.identity().items()
                if self.identity.get(name) != value
            ]
            if differences:
                segmenter.close()
                raise DataError(f"a worker would give other answers: {'; '.join(differences)}; make all machines alike")
        return segmenter

    @property
    def model(self) -> Path:
        """Where a machine keeps the artifact."""
        from platformdirs import user_cache_path

        folder: Path = user_cache_path("cloudrt")
        return folder / "artifacts" / f"{self.sha256}.onnx"

    def keep_model(self, data: bytes) -> None:
        """Write the artifact into this machine's cache, unless it is there.

        Raises
        ------
        ArtifactError
            It cannot be written.
        """
        try:
            if not self.model.is_file() or sha256(self.model) != self.sha256:
                with replacing(self.model) as partial:
                    partial.write_bytes(data)
        except OSError as error:
            raise ArtifactError(
                f"cannot keep {self.name} in {self.model.parent}: {error.strerror or error}; give its user a home that "
                "can be written, or set XDG_CACHE_HOME there"
            ) from error


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


class Worker:
    """An actor of Ray Data: called with one partition a time.

    Parameters
    ----------
    job
        What it is told.
    ledger
        A handle of the `Ledger`.
    """

    def __init__(self, job: Job, ledger: Any) -> None:
        import ray

        if not job.model.is_file():
            job.keep_model(ray.get(ledger.model.remote()))
        self.predictor = job.open()
        self.batch_size = self.predictor.batch_size
        self._job, self._ledger = job, ledger

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        """Segment the partition of `batch`, and write its rows; return counts."""
        import ray

        number = int(batch["number"][0])
        care: Care = ray.get(self._ledger.begin.remote(number))
        if care.done is None:
            images = unpack(bytes(batch["images"][0]))
            inputs = [image.source(self._job.stores) for image in images]

            def note(positions: Sequence[int]) -> None:
                ray.get(self._ledger.note.remote(number, list(positions)))

            records = segment(self.predictor, images, inputs, care, note)
            if self.predictor.batch_size != self.batch_size:
                raise ProviderError(
                    f"a worker has no memory for batches of {self.batch_size}, and all must have one size: "
                    "give a smaller --batch-size"
                )
            self._write(number, records)
            failed = sum(record.error is not None for record in records)
            done = {"number": number, "images": len(records), "failed": failed}
            ray.get(self._ledger.finish.remote(number, done))
        else:
            done = dict(care.done)
        return {name: [value] for name, value in done.items()}

    def _write(self, number: int, records: Sequence[Record]) -> None:
        if self._job.out is not None:
            Partitions(self._job.out, self._job.form, self.predictor.labels).write(number, records)


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
