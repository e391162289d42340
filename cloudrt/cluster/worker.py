"""One worker: an actor with an engine of its own, on a GPU or a group of cores. A partition in, a file of rows out.

    keys and places --Segmenter.predict: decode threads -> engine -> post-process threads--> rows --> part-00000.parquet

Decoding, engine and post-processing are threads of `cloudrt.inference.pipeline` in one process;
`cloudrt.cluster.isolation` isolates images that crash a worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloudrt.cluster.isolation import Care, Predictor, segment
from cloudrt.cluster.partitions import Partitions, unpack
from cloudrt.cluster.storage import Place
from cloudrt.engines.plan import Plan
from cloudrt.errors import ArtifactError, DataError, ProviderError
from cloudrt.inference.identity import Identity
from cloudrt.inference.journal import Record
from cloudrt.options import RunOptions
from cloudrt.system.cache import cache_folder, mark_used, prune
from cloudrt.system.files import replacing, sha256


@dataclass(frozen=True)
class Job:
    """What every worker is told.

    Parameters
    ----------
    name, sha256
        Of the artifact, which every machine keeps; see `keep_model`.
    options
        How to run it.
    plan
        How to run it, settled; None measures.
    stores
        Where the images lie.
    out, form
        Where the rows go, and in which format.
    identity
        The identity that every worker must have; None accepts any.
    """

    name: str
    sha256: str
    options: RunOptions
    plan: Plan | None = None
    stores: tuple[Place, ...] = ()
    out: Place | None = None
    form: str = "parquet"
    identity: Identity | None = field(default=None, repr=False)

    def open(self) -> Predictor:
        """Return a `Segmenter` of it on this machine.

        Raises
        ------
        CloudrtError
            The artifact cannot be kept here; the provider cannot run; another identity than that of the run.
        """
        from cloudrt.inference.pipeline import Segmenter

        segmenter = Segmenter(self.model, self.options, plan=self.plan)
        if self.identity is not None:
            differences = self.identity.differences(segmenter.identity())
            if differences:
                segmenter.close()
                raise DataError(f"a worker would give other answers: {'; '.join(differences)}; make all machines alike")
        return segmenter

    @property
    def model(self) -> Path:
        """Where a machine keeps the artifact."""
        return cache_folder("artifacts") / f"{self.sha256}.onnx"

    def keep_model(self, data: bytes) -> None:
        """Write the artifact into this machine's cache, unless it is there.

        Raises
        ------
        ArtifactError
            It cannot be written.
        """
        try:
            if not self.model.is_file() or sha256(self.model) != self.sha256:
                prune("artifacts", reserve=len(data))
                with replacing(self.model) as partial:
                    partial.write_bytes(data)
            mark_used(self.model)
        except OSError as error:
            raise ArtifactError(
                f"cannot keep {self.name} in {self.model.parent}: {error.strerror or error}; give its user a home that "
                "can be written, or set XDG_CACHE_HOME there"
            ) from error


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
