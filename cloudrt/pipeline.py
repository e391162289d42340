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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cloudrt.artifact import default_model, load_model, parse_artifact
from cloudrt.cpus import usable_cpus
from cloudrt.engines import BATCH_SIZES, choose_provider, open_engine
from cloudrt.errors import ArtifactError, DataError, ImageError
from cloudrt.files import sha256
from cloudrt.images import MAX_PIXELS, Image, ImageFile, load_image
from cloudrt.labels import Labels
from cloudrt.overlap import overlap
from cloudrt.postprocess import apply_rules
from cloudrt.rle import rle_decode
from cloudrt.stats import PipelineStats

Input = str | Path | bytes | ImageFile | Image


@dataclass(frozen=True)
class Result:
    """The answer for one image.

    Parameters
    ----------
    image
        The key of its rows: an `ImageFile`'s key, the path as given, or "image-0", "image-1" ... for bytes and arrays.
    rle
        Class name -> RLE text on the submission grid; all empty where the image failed.
    error
        Why it failed, or None.
    batch
        The position, among the inputs, of the first of its batch: where a run can be taken up again.
    """

    image: str
    rle: dict[str, str]
    error: str | None
    labels: Labels = field(repr=False)
    batch: int = field(default=0, repr=False)

    def mask(self, label: str) -> NDArray[np.uint8]:
        """Return the (H, W) uint8 mask, 0 or 1, of a class on the submission grid."""
        if label not in self.rle:
            raise DataError(f"no class named {label!r}: {', '.join(self.rle)}")
        return rle_decode(self.rle[label], self.labels.submit_grid)


@dataclass(frozen=True)
class _Decoded:
    number: int
    key: str
    image: Image | None
    error: str | None


@dataclass(frozen=True)
class Inferred:
    """What the network says of one image.

    Parameters
    ----------
    image
        The key of its rows; see `Result`.
    probability
        (C, W, H) uint8 levels 0..255 on the transposed submission grid; None where the image failed.
    presence
        (C,) uint8, where the artifact has that output and the image did not fail.
    error
        Why it failed, or None.
    batch
        See `Result`.
    """

    image: str
    probability: NDArray[np.uint8] | None
    presence: NDArray[np.uint8] | None
    error: str | None
    batch: int = 0


class Segmenter:
    """An artifact, ready to segment images. A context manager.

    Parameters
    ----------
    model
        The artifact's path; ./model.onnx, else the one that ships with the package, where it is None.
    provider
        "auto", "tensorrt", "cuda", "openvino" or "cpu".
    batch_size
        Images a batch, the last one padded; 0 takes the provider's default.
    threads
        CPU threads of each stage; 0 is all that this process may use.
    max_pixels
        Larger images are failures.

    Raises
    ------
    ArtifactError, ProviderError
        The model cannot be used, or the provider cannot run here.

    Examples
    --------
    >>> with Segmenter("model.onnx") as segmenter:  # doctest: +SKIP
    ...     rows = [result.rle["Fish"] for result in segmenter.predict(["a.jpg", "b.jpg"])]
    """

    def __init__(
        self,
        model: str | Path | None = None,
        provider: str = "auto",
        *,
        batch_size: int = 0,
        threads: int = 0,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if batch_size < 0 or threads < 0:
            raise DataError(f"batch size and threads are at least 1, found {batch_size} and {threads}")
        self.model = Path(model) if model is not None else default_model()
        loaded = load_model(self.model)
        self.choice = choose_provider(provider, parse_artifact(loaded, self.model))
        self.batch_size = batch_size or BATCH_SIZES[self.choice.provider]
        self.threads = threads or usable_cpus()
        self.max_pixels = max_pixels
        self.engine = open_engine(loaded, self.choice.provider, self.batch_size, self.threads)
        self.artifact = self.engine.artifact
        self.stats = PipelineStats(self.threads)

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
        if not self.artifact.rules:
            raise ArtifactError(
                f"{self.model} holds no rules: its network was never validated; find them with cloudrt tune"
            )
        ahead = 2 * self.batch_size + self.threads
        with ThreadPoolExecutor(self.threads, "postprocess") as finishers, closing(self.infer(inputs)) as inferred:
            try:
                yield from overlap(
                    finishers, self._finish, _seen(inferred, look), ahead, self.stats["postprocess"].pulled
                )
            finally:  # closed early, or failed: wait for what runs, not for what has not begun
                finishers.shutdown(wait=False, cancel_futures=True)

    def infer(self, inputs: Iterable[Input]) -> Generator[Inferred, None, None]:
        """Yield what the network says of each input, before any rule: what tuning looks at. In order, lazily."""
        with ThreadPoolExecutor(self.threads, "decode") as decoders, ThreadPoolExecutor(1, "engine") as engine:
            ahead = 2 * self.batch_size + self.threads
            decoded = overlap(decoders, self._decode, enumerate(inputs), ahead, self.stats["decode"].pulled)
            inferred = overlap(engine, self._infer, _batches(decoded, self.batch_size), 3, self.stats["infer"].pulled)
            try:
                for batch in inferred:
                    yield from batch
            finally:
                for pool in (decoders, engine):
                    pool.shutdown(wait=False, cancel_futures=True)

    def identity(self) -> dict[str, str | int]:
        """Return what the answers hang on: the same values, the same bytes. See `cloudrt.journal`."""
        from cloudrt.doctor import describe_machine, installed_distributions

        machine, installed = describe_machine(), installed_distributions()
        packages = ("cloudrt", "onnxruntime-gpu", "onnxruntime", "openvino", "opencv-python-headless", "simplejpeg")
        identity: dict[str, str | int] = {
            "artifact": sha256(self.model),
            "provider": self.choice.provider,
            "device": machine.cpu if self.choice.provider in ("cpu", "openvino") else ", ".join(machine.gpus),
            "precision": self.artifact.precision,
            "batch size": self.batch_size,
            "threads": self.threads,
            "largest image, pixels": self.max_pixels,
        }
        return identity | {name: installed[name] for name in packages if name in installed}

    def close(self) -> None:
        """Release the engine."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _decode(self, numbered: tuple[int, Input]) -> _Decoded:
        number, source = numbered
        key = f"image-{number}"
        if isinstance(source, ImageFile):
            key, source = source.key, source.path
        elif isinstance(source, str | Path):
            key = str(source)
        with self.stats["decode"].timed():
            try:
                image = load_image(source, self.artifact.input_size, self.max_pixels)
                return _Decoded(number, key, image, None)
            except ImageError as error:
                return _Decoded(number, key, None, str(error))

    def _infer(self, batch: list[_Decoded]) -> list[Inferred]:
        with self.stats["infer"].timed():
            images = [item.image for item in batch if item.image is not None]
            if not images:
                return [Inferred(item.key, None, None, item.error, batch[0].number) for item in batch]
            padded = np.zeros((self.batch_size, *images[0].shape), np.uint8)
            padded[: len(images)] = images
            probability, presence = self.engine.run(padded)
            rows = iter(range(len(images)))
            inferred = []
            for item in batch:
                row = next(rows) if item.image is not None else None
                inferred.append(
                    Inferred(
                        item.key,
                        None if row is None else probability[row],
                        None if row is None or presence is None else presence[row],
                        item.error,
                        batch[0].number,
                    )
                )
            return inferred

    def _finish(self, item: Inferred) -> Result:
        labels = self.labels
        if item.probability is None:
            return Result(item.image, dict.fromkeys(labels.classes, ""), item.error, labels, item.batch)
        with self.stats["postprocess"].timed():
            texts = apply_rules(item.probability, self.artifact.rules, item.presence)
        return Result(item.image, dict(zip(labels.classes, texts, strict=True)), None, labels, item.batch)


def _seen(items: Iterable[Inferred], look: Callable[[Inferred], object] | None) -> Iterator[Inferred]:
    for item in items:
        if look:
            look(item)
        yield item


def _batches(items: Iterable[_Decoded], size: int) -> Iterator[list[_Decoded]]:
    """Group items so that each group holds up to `size` sound images; failures ride along, at most `size` more."""
    batch: list[_Decoded] = []
    sound = 0
    for item in items:
        batch.append(item)
        sound += item.image is not None
        if sound == size or len(batch) == 2 * size:
            yield batch
            batch, sound = [], 0
    if batch:
        yield batch
