"""The inference pipeline, from images to RLE rows: decode -> batch -> engine -> post-process.

`Segmenter.predict` is a chain of lazy stages. Each stage processes a few groups at a time on its own threads:

    inputs --decode threads--> images --engine threads--> probabilities --post-process threads--> results

A group is one batch of the engine, or several batches if each takes only a few milliseconds. Stages pass whole groups
on. The decode threads share the images of a group, as do the post-process threads; an engine thread runs a whole group.
Taking a result starts more work in the stages before it, so that all stages run while the caller handles a result.
Results are in order, and only the groups in progress are in memory. Decoding, the engines and the kernels release the
GIL.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Self, Unpack, cast

import numpy as np

from cloudrt.arguments import check_callable, check_path, check_type, shown
from cloudrt.engines.gpu_images import open_decoder
from cloudrt.engines.plan import Plan, Samples
from cloudrt.engines.pool import EnginePool
from cloudrt.errors import DataError, ImageError
from cloudrt.images.decoding import Decoding, Input
from cloudrt.images.image import ImageFile, StoredImage, to_array
from cloudrt.images.inputs import list_inputs
from cloudrt.inference.groups import Group, infer_group
from cloudrt.inference.identity import Identity, identify
from cloudrt.inference.model_source import local_model, remote_model, require_rules
from cloudrt.inference.postprocessing import Postprocessing
from cloudrt.inference.results import Result
from cloudrt.labels import Labels
from cloudrt.masks.postprocess import Maps, postprocess_batches
from cloudrt.model.inferred import Inferred
from cloudrt.options import RunOptions, RunSettings
from cloudrt.system.cuda import Batch
from cloudrt.system.machine import usable_cpus
from cloudrt.system.overlap import Pace, overlap
from cloudrt.system.statistics import PipelineStats


class Segmenter:
    """Segments images with one artifact; a context manager.

    Parameters
    ----------
    model
        Path of the artifact. None uses ./model.onnx if it exists, else the model that ships with the package.
    options
        Options of the run.
    plan
        The plan of an earlier run, which is used without measuring. See `cloudrt.engines.plan`.
    samples
        Returns images, (N, H, W, 3) uint8 RGB, on which "auto" compares providers. None uses synthetic images.
    **settings
        Fields of `RunOptions`, which replace those of `options`: ``Segmenter("model.onnx", provider="cuda")``.

    Raises
    ------
    ArtifactError
        The model is missing, damaged, or not an artifact of cloudrt.
    DataError
        An option that does not exist, or a value that is invalid or of the wrong type.
    ProviderError
        The provider cannot run on this machine; the message says what to install.

    Notes
    -----
    Where "auto", 0 or None means the fastest value, it is measured once for each artifact and machine, which can take
    up to a minute.

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
            raise DataError(
                f"options must be a RunOptions, found {shown(options)}; use keywords such as provider='cpu'"
            )
        if model is not None:
            check_path("model", model)
        check_type("plan", plan, (Plan, NoneType), "a Plan")
        if samples is not None:
            check_callable("samples", samples)
        self.options = options = (options or RunOptions()).changed(**settings)
        self.threads = options.threads or usable_cpus()
        source = remote_model(options, plan) if options.remote.urls else local_model(model, options, plan, samples)
        self.model, self.plan, self._sha256 = source.path, source.plan, source.sha256
        input_size = source.artifact.input_size
        gpu = open_decoder(options.decoder, input_size, self.threads, options.gpus[0])
        self.stats = PipelineStats(self.threads)
        self.decoding = Decoding(input_size, options.max_pixels, self.stats["decode"], gpu)
        self.pool = EnginePool(source.open_engine, options.gpus, self.plan.batch_size)
        self.artifact = self.pool.artifact
        self.stats["infer"].threads = self.pool.slots

    @property
    def batch_size(self) -> int:
        """Images per batch: as in the plan, or fewer after running out of memory."""
        return self.pool.batch_size

    @property
    def labels(self) -> Labels:
        """The artifact's classes and grids."""
        return self.artifact.labels

    def __repr__(self) -> str:
        return f"Segmenter({str(self.model)!r}, {self.plan.describe()}, {self.threads} threads)"

    def predict(
        self,
        inputs: Input | Iterable[Input],
        look: Callable[[Inferred], object] | None = None,
        *,
        probabilities: bool = False,
    ) -> Generator[Result, None, None]:
        """Yield one `Result` for each input, in order.

        The inputs are read lazily, and only a few are in memory at a time. An input that fails yields a result with an
        `error` and empty rows, and does not stop the others.

        Parameters
        ----------
        inputs
            Paths, the bytes of image files, (H, W, 3) uint8 RGB arrays, PIL images, torch tensors of the shape
            (H, W, 3) or (3, H, W), or `ImageFile` and `StoredImage` objects. A single input is treated like a list of
            one. A single path may also be a folder, a glob pattern or a text file that lists images; see `list_inputs`.
        look
            Called with the network's output for each input, in order and before its result is yielded, for example to
            store the probabilities.
        probabilities
            Whether to set `probability` of each result.

        Raises
        ------
        ArtifactError
            The artifact has no rules, or the outputs of its graph differ from its metadata.
        DataError
            A single path that is missing or has no images, or a single input of another type; a `look` that is not a
            function.
        ProviderError
            During the iteration: an engine fails, a batch of one image does not fit into memory, or the `Segmenter` is
            closed.
        """
        require_rules(self.artifact, self.model)
        if look is not None:
            check_callable("look", look)
        return self._predict(self._several(inputs), look, probabilities)

    def _several(self, inputs: Input | Iterable[Input]) -> Iterable[Input]:
        """Return an iterable of inputs: a path is expanded by `list_inputs`, another single input becomes a list."""
        if isinstance(inputs, str | Path):
            return list_inputs([inputs], None, self.labels)
        try:
            array = to_array(inputs)
        except ImageError:  # fails as the only image of the run
            return [cast(Input, inputs)]
        if isinstance(array, bytes | ImageFile | StoredImage) or (isinstance(array, np.ndarray) and array.ndim == 3):
            return [array]
        if isinstance(array, np.ndarray) and array.ndim != 4 and array.dtype.kind in "biuf":  # not an array of paths
            raise DataError(f"arrays must be (H, W, 3) or (N, H, W, 3) uint8 RGB, found {array.shape} {array.dtype}")
        if isinstance(inputs, bytes | bytearray) or not isinstance(inputs, Iterable):
            raise DataError(f"inputs must be paths, bytes, arrays or images, found {type(inputs).__name__}")
        return inputs

    def _predict(
        self, inputs: Iterable[Input], look: Callable[[Inferred], object] | None, probabilities: bool
    ) -> Generator[Result, None, None]:
        pace = Pace()
        limit = self.options.max_pixels
        stage = Postprocessing(self.labels, self.texts, self.stats["postprocess"], probabilities, limit)
        with (
            ThreadPoolExecutor(self.threads, "postprocess") as finishers,
            closing(self._run(inputs, pace)) as groups,
        ):
            try:
                for group in stage.run(_each_passed_to(look, groups) if look else groups, finishers):
                    pace.arrived(sum(len(texts.keys) for texts in group))
                    for texts in group:
                        yield from stage.results(texts)
            finally:  # after an error or an early close, cancel the tasks that have not started
                finishers.shutdown(wait=False, cancel_futures=True)
                self.stats.drop()

    def infer(self, inputs: Input | Iterable[Input]) -> Generator[Inferred, None, None]:
        """Yield the network's output for each input, before any rule is applied, in order and lazily.

        The inputs and errors are those of `predict`, but no rules are needed.
        """
        return self._infer_each(self._several(inputs))

    def _infer_each(self, inputs: Iterable[Input]) -> Generator[Inferred, None, None]:
        pace = Pace()
        with closing(self._run(inputs, pace)) as groups:
            try:
                for group in groups:
                    pace.arrived(len(group.decoded.keys))
                    yield from group.each()
            finally:
                self.stats.drop()

    def texts(self, batches: Sequence[Maps]) -> list[str]:
        """Return the RLE texts of batches as one list: image by image, one per class; see `postprocess_batches`."""
        return postprocess_batches(batches, self.artifact.rules)

    def _run(self, inputs: Iterable[Input], pace: Pace) -> Generator[Group, None, None]:
        """Yield groups of inputs with the network's outputs, in order; `pace` sets the number of batches per group."""
        slots, stage = self.pool.slots, self.stats["infer"]
        # The next group of every engine, and at least one image for every decoding thread.
        ahead = slots + 1 + -(-self.threads // self.batch_size)

        def empty() -> Batch:
            batches, decoder = pace.batches(self.batch_size), self.decoding.decoder
            if decoder is not None and self.pool.takes(decoder.place):  # the images stay on the GPU
                return decoder.empty(batches * self.batch_size)
            return self.pool.empty(batches)

        with (
            ThreadPoolExecutor(self.threads, "decode") as decoders,
            ThreadPoolExecutor(1, "gpu-decode") as gpu,
            ThreadPoolExecutor(slots, "engine") as engines,
        ):
            try:
                decoded = self.decoding.run(inputs, decoders, empty, ahead, gpu)
                for group in overlap(engines, partial(infer_group, self.pool, stage), decoded, slots + 1):
                    stage.pulled(sum(len(batches.outputs) for batches in group.batches))
                    yield group
            finally:
                for pool in (decoders, gpu, engines):
                    pool.shutdown(wait=False, cancel_futures=True)

    def identity(self) -> Identity:
        """Return everything that results depend on: equal identities give the same bytes."""
        return identify(self._sha256, self.artifact.precision, self.plan, self.options, self.threads)

    def shrink(self, batch_size: int) -> None:
        """Reduce the batch size to that of a resumed run which ran out of memory; 0 and larger sizes change nothing."""
        if 0 < batch_size < self.batch_size:
            self.pool.resize(batch_size)

    def close(self) -> None:
        """Release the engines."""
        self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _each_passed_to(look: Callable[[Inferred], object], groups: Iterable[Group]) -> Iterator[Group]:
    for group in groups:
        for item in group.each():
            look(item)
        yield group
