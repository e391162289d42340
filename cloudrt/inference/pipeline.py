"""Images in, RLE rows out: decode -> batch -> engine -> post-process, overlapped, in order, in bounded memory.

`Segmenter.predict` is a chain of lazy stages, each of which keeps a few groups in flight on threads of its own:

    inputs --decode threads--> images --engine threads--> probabilities --post-process threads--> results

A group is one batch of the engine, or several where batches take less than some milliseconds: work is handed over by
the group, and threads share the images of a group. Pulling a result refills the stages before it, so that every stage
works while the caller handles a result, and memory is that of the groups in flight. Decoding, the engines and the
kernels all release the GIL.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, Unpack

import numpy as np
from numpy.typing import NDArray

from cloudrt.engines import tensorrt_rtx
from cloudrt.engines.choice import open_engine
from cloudrt.engines.gpu_images import open_decoder
from cloudrt.engines.plan import Plan, Samples, make_plan
from cloudrt.engines.pool import EnginePool
from cloudrt.errors import ArtifactError, DataError, MemoryExhausted
from cloudrt.images.decoding import Decoded, Decoding, Input
from cloudrt.images.image import ImageFile, StoredImage
from cloudrt.inference.identity import Identity
from cloudrt.inference.results import Result
from cloudrt.labels import Labels
from cloudrt.masks.postprocess import postprocess_batch
from cloudrt.model.artifact import Artifact, default_model, load_model, parse_artifact
from cloudrt.model.inferred import Inferred
from cloudrt.options import RunOptions, RunSettings
from cloudrt.system.cuda import Batch
from cloudrt.system.files import sha256
from cloudrt.system.machine import describe_machine, usable_cpus
from cloudrt.system.overlap import Pace, overlap, overlap_parts
from cloudrt.system.statistics import PipelineStats
from cloudrt.system.versions import package_versions


class Segmenter:
    """Segments images with one artifact. A context manager.

    Parameters
    ----------
    model
        Path of the artifact; None takes ./model.onnx, else the model that ships with the package.
    options
        How to run it.
    plan
        How to run it, settled by an earlier run: nothing is measured. See `cloudrt.engines.plan`.
    samples
        Gives images (N, H, W, 3), on which "auto" compares providers; without it, made-up scenes are compared.
    **settings
        Fields of `RunOptions`, which replace those of `options`: ``Segmenter("model.onnx", provider="cuda")``.

    Raises
    ------
    ArtifactError
        The model is missing, damaged, or not an artifact of cloudrt.
    DataError
        An option that does not exist, or a value that is refused.
    ProviderError
        The provider cannot run here; names what to install.

    Notes
    -----
    What is left to "auto" and 0 is measured once for each artifact and machine, which takes some seconds.

    Examples
    --------
    >>> with Segmenter("model.onnx") as segmenter:  # doctest: +SKIP
    ...     rows = [result.rle["Fish"] for result in segmenter.predict(["a.jpg", "b.jpg"])]
    """

    def __init__(
        self,
        model: str | Path | None = None,
        options: RunOptions | None = None,
        *,
        plan: Plan | None = None,
        samples: Samples | None = None,
        **settings: Unpack[RunSettings],
    ) -> None:
        if options is not None and not isinstance(options, RunOptions):
            raise DataError(f"options are a RunOptions, found {options!r}; use keywords such as provider='cpu'")
        self.options = options = (options or RunOptions()).changed(**settings)
        self.model = Path(model) if model is not None else default_model()
        loaded = load_model(self.model)
        artifact = parse_artifact(loaded, self.model)
        self.threads = options.threads or usable_cpus()
        self._sha256 = sha256(self.model)
        gpu = open_decoder(options.decoder, artifact.input_size, self.threads, options.devices[0])
        self.plan = make_plan(loaded, artifact, options, plan, samples)
        self.stats = PipelineStats(self.threads)
        self.decoding = Decoding(artifact.input_size, options.max_pixels, self.stats["decode"], gpu)
        self.pool = EnginePool(
            lambda device, size: open_engine(
                loaded, self.plan.provider, size, self.threads, self.plan.options(device, options.allow_cpu)
            ),
            options.devices,
            self.plan.batch_size,
        )
        self.artifact = self.pool.artifact
        self.stats["infer"].threads = self.pool.slots

    @property
    def batch_size(self) -> int:
        """Images a batch at present: that of the plan, or less where memory ran out."""
        return self.pool.batch_size

    @property
    def labels(self) -> Labels:
        """The artifact's classes and grids."""
        return self.artifact.labels

    def predict(
        self, inputs: Iterable[Input], look: Callable[[Inferred], object] | None = None
    ) -> Generator[Result, None, None]:
        """Yield one `Result` for each input, in order; reads the inputs lazily, and keeps only a few in memory.

        An input that fails yields a result with an `error` and empty rows; the others go on. `look` is called in order,
        some images ahead, with what the network says of each: to keep the probabilities, say.

        Raises
        ------
        ArtifactError
            The artifact holds no rules.
        """
        _refuse_one(inputs)
        require_rules(self.artifact, self.model)
        pace, stats = Pace(), self.stats["postprocess"]
        with (
            ThreadPoolExecutor(self.threads, "postprocess") as finishers,
            closing(self._run(inputs, pace)) as groups,
        ):
            try:
                shares = self._shares(groups, look)
                for done in overlap_parts(finishers, self._finish, shares, 2):
                    results = [result for share in done for result in share]
                    stats.pulled(sum(result.error is None for result in results))
                    pace.arrived(len(results))
                    yield from results
            finally:  # closed early, or failed: wait for what runs, not for what has not begun
                finishers.shutdown(wait=False, cancel_futures=True)
                self.stats.drop()

    def infer(self, inputs: Iterable[Input]) -> Generator[Inferred, None, None]:
        """Yield what the network says of each input, before any rule: what tuning looks at. In order, lazily."""
        _refuse_one(inputs)
        pace = Pace()
        with closing(self._run(inputs, pace)) as groups:
            try:
                for group in groups:
                    pace.arrived(len(group.decoded.keys))
                    yield from group.each()
            finally:
                self.stats.drop()

    def texts(self, levels: NDArray[np.uint8], presence: NDArray[np.uint8] | None) -> list[list[str]]:
        """Return the RLE texts, one a class, of images: (n, C, W, H) levels, and (n, C) presence or None."""
        return postprocess_batch(levels, self.artifact.rules, presence)

    def _run(self, inputs: Iterable[Input], pace: Pace) -> Generator[_Group, None, None]:
        """Yield groups of inputs with the network's outputs, in order; `pace` says how many batches a group holds."""
        slots = self.pool.slots
        # Enough for every engine's next group, and an image for every thread.
        ahead = slots + 1 + -(-self.threads // self.batch_size)

        def empty() -> Batch:
            batches, decoder = pace.batches(self.batch_size), self.decoding.decoder
            if decoder is not None and self.pool.takes(decoder.place):  # images stay on the GPU
                return decoder.empty(batches * self.batch_size)
            return self.pool.empty(batches)

        with (
            ThreadPoolExecutor(self.threads, "decode") as decoders,
            ThreadPoolExecutor(1, "gpu-decode") as gpu,
            ThreadPoolExecutor(slots, "engine") as engines,
        ):
            try:
                decoded = self.decoding.run(inputs, decoders, empty, ahead, gpu)
                for group in overlap(engines, self._infer, decoded, slots + 1):
                    self.stats["infer"].pulled(len(group.batches))
                    yield group
            finally:
                for pool in (decoders, gpu, engines):
                    pool.shutdown(wait=False, cancel_futures=True)

    def identity(self) -> Identity:
        """Return what the answers depend on: the same values give the same bytes."""
        packages = ["cloudrt", "onnxruntime-gpu", "onnxruntime", "openvino", "opencv-python-headless", "simplejpeg"]
        if self.options.decoder == "gpu":
            packages += ["nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13"]
        if self.plan.provider == "tensorrt":
            packages += ["tensorrt", "tensorrt-cu12", "tensorrt-cu13"]
        if self.plan.provider == "tensorrt-rtx":
            packages += tensorrt_rtx.PACKAGES
        machine, plan = describe_machine(), self.plan
        on_cpu = plan.provider in ("cpu", "openvino")
        return Identity(
            artifact=self._sha256,
            provider=plan.provider,
            batch_size=plan.batch_size,
            streams=plan.streams,
            compute_precision=plan.compute_precision,
            cuda_graph=plan.cuda_graph,
            channels_last=plan.channels_last,
            device=machine.cpu if on_cpu else machine.gpus[self.options.devices[0]],
            precision=self.artifact.precision,
            threads=self.threads,
            decoder=self.options.decoder,
            max_pixels=self.options.max_pixels,
            versions=package_versions(*packages),
        )

    def shrink(self, batch_size: int) -> None:
        """Go on with a smaller batch, where an earlier run came down to it; 0 or the present one change nothing."""
        if 0 < batch_size < self.batch_size:
            self.pool.resize(batch_size)

    def close(self) -> None:
        """Release the engines."""
        self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _infer(self, decoded: Decoded) -> _Group:
        """Run the batches of a group; smaller ones where memory runs out, or ran out since they were decoded."""
        group = _Group(decoded)
        begin, count, errors, times = 0, len(decoded.keys), decoded.errors, []
        while begin < count:
            size = self.batch_size
            rows = range(begin, min(begin + size, count))
            if errors and all(row in errors for row in rows):
                group.batches.append(_Batch(rows, size))
            else:
                began = time.perf_counter()
                try:
                    probability, presence = self.pool.run(decoded.images[rows.start : rows.stop])
                except MemoryExhausted as reason:
                    self.pool.step_down(size, reason)
                    continue
                times.append(time.perf_counter() - began)
                group.batches.append(_Batch(rows, size, probability, presence))
            begin = rows.stop
        self.stats["infer"].add_all(times)
        return group

    def _shares(
        self, groups: Iterable[_Group], look: Callable[[Inferred], object] | None
    ) -> Iterator[Iterator[tuple[_Group, range]]]:
        """Yield a share of the rows of each group for every post-processing thread."""
        for group in groups:
            if look:
                for item in group.each():
                    look(item)
            count = len(group.decoded.keys)
            size = -(-count // self.threads)
            yield ((group, range(begin, min(begin + size, count))) for begin in range(0, count, size))

    def _finish(self, share: tuple[_Group, range]) -> list[Result]:
        """Return the results of some rows of a group."""
        group, wanted = share
        decoded, labels = group.decoded, self.labels
        results = []
        for batch in group.batches:
            rows = range(max(wanted.start, batch.rows.start), min(wanted.stop, batch.rows.stop))
            if decoded.errors:
                texts = iter(self._some_texts(batch, [row for row in rows if row not in decoded.errors]))
            else:
                texts = iter(self._some_texts(batch, rows))
            for row in rows:
                error = decoded.errors.get(row)
                row_texts = next(texts) if error is None else [""] * len(labels.classes)
                results.append(
                    Result(
                        image=decoded.keys[row],
                        rle=dict(zip(labels.classes, row_texts, strict=True)),
                        error=error,
                        labels=labels,
                        batch=decoded.number + batch.rows.start,
                        batch_size=batch.size,
                    )
                )
        return results

    def _some_texts(self, batch: _Batch, rows: Sequence[int]) -> list[list[str]]:
        """Return the RLE texts of some rows of a group, which are of `batch`."""
        if not rows or batch.probability is None:
            return []
        began, first = time.perf_counter(), batch.rows.start
        whole = rows[-1] - rows[0] + 1 == len(rows)  # else a copy, without the rows of inputs that failed
        some = slice(rows[0] - first, rows[-1] - first + 1) if whole else [row - first for row in rows]
        texts = self.texts(batch.probability[some], None if batch.presence is None else batch.presence[some])
        self.stats["postprocess"].add((time.perf_counter() - began) / len(rows), len(rows))
        return texts


@dataclass(frozen=True)
class _Batch:
    """The network's outputs for one batch.

    Parameters
    ----------
    rows
        Its rows in the group.
    size
        N of the engine; the last batch of a run may have fewer rows.
    probability, presence
        (n, C, W, H) and (n, C) uint8; None where every input failed, and where the artifact has no such output.
    """

    rows: range
    size: int
    probability: NDArray[np.uint8] | None = None
    presence: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class _Group:
    """Consecutive inputs, decoded, and the network's outputs for them, in order."""

    decoded: Decoded
    batches: list[_Batch] = field(default_factory=list)

    def each(self) -> Iterator[Inferred]:
        """Yield the outputs for each input."""
        decoded = self.decoded
        for batch in self.batches:
            for position, row in enumerate(batch.rows):
                error = decoded.errors.get(row)
                sound = error is None and batch.probability is not None
                yield Inferred(
                    image=decoded.keys[row],
                    probability=batch.probability[position] if sound and batch.probability is not None else None,
                    presence=batch.presence[position] if sound and batch.presence is not None else None,
                    error=error,
                    batch=decoded.number + batch.rows.start,
                    batch_size=batch.size,
                )


def require_rules(artifact: Artifact, model: Path) -> None:
    """Refuse an artifact without rules, which gives probabilities but no masks.

    Raises
    ------
    ArtifactError
        Says how to find rules.
    """
    if not artifact.rules:
        raise ArtifactError(f"{model} holds no rules: its network was never validated; find them with cloudrt tune")


def _refuse_one(inputs: Iterable[Input]) -> None:
    """Refuse a single input: a text is a sequence of texts too, and an array of arrays."""
    one = str | bytes | bytearray | Path | ImageFile | StoredImage | np.ndarray
    if isinstance(inputs, one) or not isinstance(inputs, Iterable):
        raise DataError(f"inputs are several: give a list of paths, bytes or arrays, found {type(inputs).__name__}")
