"""Images in, RLE rows out: decode -> batch -> engine -> post-process, overlapped, in order, in bounded memory.

`Segmenter.predict` is a chain of four lazy stages, each of which keeps a few items in flight on threads of its own:

    inputs --decode threads--> images --batch--> engine thread --> probabilities --post-process threads--> results

Pulling a result refills the windows behind it, so that every stage works while the caller handles a result, and
nothing piles up: memory is that of the windows. Decoding, the engines and the kernels all release the GIL.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Self, Unpack

import numpy as np

from cloudrt.engines.choice import open_engine
from cloudrt.engines.plan import Plan, make_plan
from cloudrt.engines.pool import EnginePool
from cloudrt.errors import ArtifactError, DataError, MemoryExhausted
from cloudrt.images.decoding import Decoded, Decoding, Input, open_decoder
from cloudrt.images.image import ImageFile, StoredImage
from cloudrt.inference.identity import Identity
from cloudrt.inference.results import Result
from cloudrt.labels import Labels
from cloudrt.masks.postprocess import apply_rules
from cloudrt.model.artifact import default_model, load_model, parse_artifact
from cloudrt.model.inferred import Inferred
from cloudrt.options import RunOptions, RunSettings
from cloudrt.system.files import sha256
from cloudrt.system.machine import describe_machine, usable_cpus
from cloudrt.system.overlap import overlap
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
        gpu = open_decoder(options.decoder, self.threads, options.devices[0])
        self.plan = make_plan(loaded, artifact, self._sha256, options, plan)
        self.stats = PipelineStats(self.threads)
        self._decoding = Decoding(artifact.input_size, options.max_pixels, self.stats["decode"], gpu)
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

    def predict(self, inputs: Iterable[Input], look: Callable[[Inferred], object] | None = None) -> Iterator[Result]:
        """Yield one `Result` for each input, in order; reads the inputs lazily, and keeps only a few in memory.

        An input that fails yields a result with an `error` and empty rows; the others go on. `look` is called in order,
        some images ahead, with what the network says of each: to keep the probabilities, say.

        Raises
        ------
        ArtifactError
            The artifact holds no rules.
        """
        _refuse_one(inputs)
        if not self.artifact.rules:
            raise ArtifactError(
                f"{self.model} holds no rules: its network was never validated; find them with cloudrt tune"
            )
        ahead = self._ahead()
        with ThreadPoolExecutor(self.threads, "postprocess") as finishers, closing(self.infer(inputs)) as inferred:
            try:
                yield from overlap(
                    finishers, self._finish, _seen(inferred, look), ahead, self.stats["postprocess"].pulled
                )
            finally:  # closed early, or failed: wait for what runs, not for what has not begun
                finishers.shutdown(wait=False, cancel_futures=True)

    def infer(self, inputs: Iterable[Input]) -> Generator[Inferred, None, None]:
        """Yield what the network says of each input, before any rule: what tuning looks at. In order, lazily."""
        _refuse_one(inputs)
        with (
            ThreadPoolExecutor(self.threads, "decode") as decoders,
            ThreadPoolExecutor(1, "gpu-decode") as gpu,
            ThreadPoolExecutor(self.pool.slots, "engine") as engine,
        ):
            decoded = self._decoding.run(inputs, decoders, self._ahead(), gpu)
            batches = _batches(decoded, lambda: self.batch_size)
            inferred = overlap(engine, self._infer, batches, self.pool.slots + 2, self.stats["infer"].pulled)
            try:
                for batch in inferred:
                    yield from batch
            finally:
                for pool in (decoders, gpu, engine):
                    pool.shutdown(wait=False, cancel_futures=True)

    def _ahead(self) -> int:
        """How many images each window holds: enough for every engine's next batch."""
        return (self.pool.slots + 1) * self.batch_size + self.threads

    def identity(self) -> Identity:
        """Return what the answers depend on: the same values give the same bytes."""
        packages = ["cloudrt", "onnxruntime-gpu", "onnxruntime", "openvino", "opencv-python-headless", "simplejpeg"]
        if self.options.decoder == "gpu":
            packages += ["nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13"]
        if self.plan.provider == "tensorrt":
            packages += ["tensorrt", "tensorrt-cu12", "tensorrt-cu13"]
        machine, plan = describe_machine(), self.plan
        on_cpu = plan.provider in ("cpu", "openvino")
        return Identity(
            artifact=self._sha256,
            provider=plan.provider,
            batch_size=plan.batch_size,
            streams=plan.streams,
            compute_precision=plan.compute_precision,
            cuda_graph=plan.cuda_graph,
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

    def _infer(self, batch: list[Decoded]) -> list[Inferred]:
        """Run one batch; in smaller ones where memory runs out, or ran out since the batch was put together."""
        inferred: list[Inferred] = []
        left = [batch]
        while left:
            part, size = left.pop(0), self.batch_size
            parts = list(_batches(part, lambda size=size: size))  # type: ignore[misc]
            if len(parts) > 1:
                left = parts + left
                continue
            try:
                inferred += self._run(part, size)
            except MemoryExhausted as reason:
                self.pool.step_down(size, reason)
                left.insert(0, part)
        return inferred

    def _run(self, batch: list[Decoded], size: int) -> list[Inferred]:
        images = [item.image for item in batch if item.image is not None]
        first = batch[0].number
        if not images:
            return [Inferred(item.key, None, None, item.error, first, size) for item in batch]
        with self.stats["infer"].timed():
            probability, presence = self.pool.run(images)
        rows = iter(range(len(images)))
        inferred = []
        for item in batch:
            if item.image is None:
                inferred.append(Inferred(item.key, None, None, item.error, first, size))
                continue
            row = next(rows)
            levels = None if presence is None else presence[row]
            inferred.append(Inferred(item.key, probability[row], levels, None, first, size))
        return inferred

    def _finish(self, item: Inferred) -> Result:
        labels = self.labels
        if item.probability is None:
            return Result(
                item.image, dict.fromkeys(labels.classes, ""), item.error, labels, item.batch, item.batch_size
            )
        with self.stats["postprocess"].timed():
            texts = apply_rules(item.probability, self.artifact.rules, item.presence)
        return Result(
            item.image, dict(zip(labels.classes, texts, strict=True)), None, labels, item.batch, item.batch_size
        )


def _refuse_one(inputs: Iterable[Input]) -> None:
    """Refuse a single input: a text is a sequence of texts too, and an array of arrays."""
    one = str | bytes | bytearray | Path | ImageFile | StoredImage | np.ndarray
    if isinstance(inputs, one) or not isinstance(inputs, Iterable):
        raise DataError(f"inputs are several: give a list of paths, bytes or arrays, found {type(inputs).__name__}")


def _seen(items: Iterable[Inferred], look: Callable[[Inferred], object] | None) -> Iterator[Inferred]:
    for item in items:
        if look:
            look(item)
        yield item


def _batches(items: Iterable[Decoded], size: Callable[[], int]) -> Iterator[list[Decoded]]:
    """Group items so that each group holds up to `size` sound images; failures ride along, at most `size` more."""
    batch: list[Decoded] = []
    sound, most = 0, size()
    for item in items:
        batch.append(item)
        sound += item.image is not None
        if sound == most or len(batch) == 2 * most:
            yield batch
            batch, sound, most = [], 0, size()
    if batch:
        yield batch
