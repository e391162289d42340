"""One worker: an actor with an engine of its own, on a GPU or a group of cores. A partition in, a file of rows out.

    keys and places --Segmenter.predict: decode threads -> engine -> post-process threads--> rows --> part-00000.parquet

Decoding, engine and post-processing are threads of `cloudrt.inference.pipeline` in one process;
`cloudrt.cluster.isolation` isolates images that crash a worker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cloudrt.cluster.isolation import Care, Predictor, segment
from cloudrt.cluster.partitions import Partitions, unpack
from cloudrt.cluster.storage import Place
from cloudrt.engines.plan import Plan
from cloudrt.errors import ArtifactError, DataError, ProviderError
from cloudrt.inference.journal import Identity, Record
from cloudrt.system.files import replacing, sha256


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
        from cloudrt.inference.pipeline import Segmenter

        segmenter = Segmenter(
            self.model,
            self.provider,
            batch_size=self.batch_size,
            threads=self.threads,
            max_pixels=self.max_pixels,
            compute=self.compute,
            allow_cpu=self.allow_cpu,
            decoder=self.decoder,
            plan=self.plan,
        )
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
