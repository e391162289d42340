"""A worker: an actor with its own engine, on a GPU or a group of cores, which turns partitions into files of rows.

    images --Segmenter.predict: decode threads -> engine -> post-process threads--> rows --> part-00000.parquet

Decoding, engine and post-processing are threads of `cloudrt.inference.pipeline` in one process;
`cloudrt.cluster.isolation` isolates images that crash a worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloudrt.cluster.isolation import PartitionState, Predictor, segment
from cloudrt.cluster.listing import unpack
from cloudrt.cluster.panoramas import PanoramaPredictor
from cloudrt.cluster.partitions import Partitions
from cloudrt.cluster.storage import Place
from cloudrt.engines.plan import Plan
from cloudrt.errors import ArtifactError, DataError, ProviderError
from cloudrt.geo.tiling import Tiling
from cloudrt.inference.identity import Identity
from cloudrt.inference.journal_records import Record
from cloudrt.options import RunOptions
from cloudrt.system.cache import cache_folder, mark_used, prune
from cloudrt.system.files import replacing, sha256


@dataclass(frozen=True)
class Job:
    """The work of all workers.

    Parameters
    ----------
    name, sha256
        File name and digest of the artifact, which every machine stores; see `keep_model`.
    options
        How to run it.
    plan
        Plan of an earlier measurement; None measures.
    stores
        Places of the images.
    out, form, run
        Place and format of the rows, and digest of the run's identity.
    identity
        The identity that every worker must have; None accepts any.
    tiling
        How to cut panoramas into tiles; None segments images as they are.
    """

    name: str
    sha256: str
    options: RunOptions
    plan: Plan | None = None
    stores: tuple[Place, ...] = ()
    out: Place | None = None
    form: str = "parquet"
    run: str = ""
    identity: Identity | None = field(default=None, repr=False)
    tiling: Tiling | None = None

    def open(self) -> Predictor:
        """Open the artifact on this machine.

        Raises
        ------
        CloudrtError
            The provider cannot run here, or the identity differs from that of the run.
        """
        from cloudrt.inference.pipeline import Segmenter

        segmenter = Segmenter(self.model, self.options, plan=self.plan)
        if self.identity is not None:
            differences = self.identity.differences(segmenter.identity())
            if differences:
                segmenter.close()
                raise DataError(
                    f"a worker would give different results: {'; '.join(differences)}; use identical machines"
                )
        return segmenter if self.tiling is None else PanoramaPredictor(segmenter, self.tiling)

    @property
    def model(self) -> Path:
        """Path of the artifact on every machine."""
        return cache_folder("artifacts") / f"{self.sha256}.onnx"

    def keep_model(self, data: bytes) -> None:
        """Write the artifact to this machine's cache, unless it is there.

        Raises
        ------
        ArtifactError
            The cache cannot be written.
        """
        try:
            if not self.model.is_file() or sha256(self.model) != self.sha256:
                prune("artifacts", reserve=len(data))
                with replacing(self.model) as partial:
                    partial.write_bytes(data)
            mark_used(self.model)
        except OSError as error:
            raise ArtifactError(
                f"cannot store {self.name} in {self.model.parent}: {error.strerror or error}; give the user a writable "
                "home there, or set XDG_CACHE_HOME"
            ) from error


class Worker:
    """An actor of Ray Data, called with one partition at a time.

    Parameters
    ----------
    job
        The work of all workers.
    ledger
        Handle of the `Ledger`.
    """

    def __init__(self, job: Job, ledger: Any) -> None:
        import ray

        if not job.model.is_file():
            job.keep_model(ray.get(ledger.model.remote()))
        self.predictor = job.open()
        self.batch_size = self.predictor.batch_size
        self._job, self._ledger = job, ledger

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        """Segment the partition in `batch`, write its rows, and return the counts."""
        import ray

        number = int(batch["number"][0])
        state: PartitionState = ray.get(self._ledger.begin.remote(number))
        if state.done is None:
            images = unpack(bytes(batch["images"][0]))
            inputs = [image.source(self._job.stores) for image in images]

            def note(positions: Sequence[int]) -> None:
                ray.get(self._ledger.note.remote(number, list(positions)))

            records = segment(self.predictor, images, inputs, state, note)
            if self.predictor.batch_size != self.batch_size:
                raise ProviderError(
                    f"a worker ran out of memory with batches of {self.batch_size}, and all workers need one batch "
                    "size: give a smaller --batch-size"
                )
            self._write(number, records)
            failed = sum(record.error is not None for record in records)
            done = {"number": number, "images": len(records), "failed": failed}
            ray.get(self._ledger.finish.remote(number, done))
        else:
            done = dict(state.done)
        return {name: [value] for name, value in done.items()}

    def _write(self, number: int, records: Sequence[Record]) -> None:
        if self._job.out is not None:
            placed, run = self._job.tiling is not None, self._job.run
            partitions = Partitions(self._job.out, self._job.form, self.predictor.labels, placed=placed, run=run)
            partitions.write(number, records)
