"""What speed costs: each model in each provider, its rate from files to CSV beside what its submission scores.

With a truth the score is the competition's Dice; without one, the Dice between the submission and that of the first
model in ONNX Runtime's CPU provider, fp32 where one is. A point that no other beats in both is on the front.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cloudrt.engines.choice import hindrance
from cloudrt.errors import CloudrtError, DataError, RleError
from cloudrt.images.image import ImageFile
from cloudrt.inference.pipeline import Segmenter
from cloudrt.inference.submission import open_submission
from cloudrt.labels import Labels
from cloudrt.masks.metric import dice
from cloudrt.masks.rle import rle_decode, rle_to_submit_grid
from cloudrt.masks.table import Table, read_table
from cloudrt.model.artifact import read_artifact

from .stages import Timing

CHUNK = 64
"""Images that a way runs before it is the next one's turn."""
WARM_UP = 16

PROVIDERS = ("cpu", "openvino", "cuda", "tensorrt")


@dataclass(frozen=True)
class Way:
    """A model in a provider.

    Parameters
    ----------
    model, provider, precision
        Which.
    timing
        Seconds per image from files to CSV.
    dice
        Of its submission, against the truth or the reference.
    empty_mismatch
        Share of rows empty in it and not in the truth or reference, or the other way.
    front
        Whether no other way is both as fast and as good.
    """

    model: str
    provider: str
    precision: str
    timing: Timing
    dice: float
    empty_mismatch: float
    front: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"timing": self.timing.to_dict()}


@dataclass(frozen=True)
class Accuracy:
    """All ways, what they are judged against, and those that cannot run: name -> why.

    `all_empty` is what a submission without a mask scores against the truth; None where there is no truth.
    """

    against: str
    all_empty: float | None
    ways: list[Way]
    skipped: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return vars(self) | {"ways": [way.to_dict() for way in self.ways]}


def measure_accuracy(
    models: Sequence[Path],
    files: Sequence[ImageFile],
    truth: Table | None,
    folder: Path,
    repeat: int,
    advance: Callable[[], object],
) -> Accuracy:
    """Run every way over the images, chunk by chunk in turns, after a few that do not count.

    Parameters
    ----------
    models
        Artifacts of the same classes and grids.
    files
        The images.
    truth
        What `read_truth` gives, or None.
    folder
        For the submissions.
    repeat
        How often the images are run where they make one chunk alone; more of them are run once.
    advance
        Called after each of the `rounds(models, files, repeat)` turns, and for those of ways that cannot run.
    """
    labels = read_artifact(models[0]).labels
    chunks = _split(files, repeat)
    with ExitStack() as stack:
        segmenters, skipped = _open(models, stack)
        for _ in range((1 + len(chunks)) * len(skipped)):
            advance()
        names = list(segmenters)
        seconds: list[list[float]] = [[] for _ in names]
        tables: list[Table] = [{} for _ in names]
        for number, chunk in enumerate([files[:WARM_UP], *chunks]):
            for way, segmenter in enumerate(segmenters.values()):
                path = folder / f"way-{way}-{number}.csv"
                began = time.perf_counter()
                with open_submission(path, labels) as submission:
                    for result in segmenter.predict(chunk):
                        submission.add(result.image, result.rle, result.error)
                if number:
                    seconds[way].append((time.perf_counter() - began) / len(chunk))
                    tables[way] |= read_table(path, labels)
                advance()
        precisions = [segmenter.artifact.precision for segmenter in segmenters.values()]
    first = min(range(len(names)), key=lambda i: (names[i][1] != "cpu", precisions[i] != "fp32", i))
    against = f"{names[first][0]} in ONNX Runtime CPU" if truth is None else "the truth"
    ways = []
    for (model_name, provider), table, precision, taken in zip(names, tables, precisions, seconds, strict=True):
        score, mismatch = _judge(table, truth or tables[first], labels, truth is not None)
        ways.append(Way(model_name, provider, precision, Timing(tuple(taken)), score, mismatch))
    all_empty = None
    if truth is not None:
        all_empty = float(np.mean([not rle_to_submit_grid(text, labels).any() for text in truth.values()]))
    return Accuracy(against, all_empty, mark_front(ways), skipped)


def _open(models: Sequence[Path], stack: ExitStack) -> tuple[dict[tuple[str, str], Segmenter], dict[str, str]]:
    """Open each model in each provider; return those that run, and why the others do not."""
    segmenters, skipped = {}, {}
    for model, name in zip(models, _tell_apart(models), strict=True):
        for provider in PROVIDERS:
            reason = hindrance(provider, read_artifact(model))
            if reason is None:
                try:
                    segmenters[name, provider] = stack.enter_context(Segmenter(model, provider=provider))
                except CloudrtError as error:
                    reason = str(error)
            if reason is not None:
                skipped[f"{name}, {provider}"] = reason
    return segmenters, skipped


def _tell_apart(models: Sequence[Path]) -> list[str]:
    """Return the names of files; with as much of their folders as tells them apart."""
    for parts in range(1, max(len(model.parts) for model in models) + 1):
        names = ["/".join(model.parts[-parts:]) for model in models]
        if len(set(names)) == len(names):
            break
    return names


def rounds(models: Sequence[Path], files: Sequence[ImageFile], repeat: int) -> int:
    """Return how many turns `measure_accuracy` takes or announces."""
    return len(models) * len(PROVIDERS) * (1 + len(_split(files, repeat)))


def _split(files: Sequence[ImageFile], repeat: int) -> list[Sequence[ImageFile]]:
    """Return the chunks in which the images are run: of about `CHUNK`, none much smaller."""
    count = len(files) // CHUNK
    if count < 2:
        return [files] * repeat
    edges = [len(files) * number // count for number in range(count + 1)]
    return [files[begin:end] for begin, end in pairwise(edges)]


def mark_front(ways: Sequence[Way]) -> list[Way]:
    """Return the ways, those marked that no other beats: Pareto's front of speed and Dice."""

    def beaten(one: Way) -> bool:
        return any(
            other.timing.median <= one.timing.median
            and other.dice >= one.dice
            and (other.timing.median < one.timing.median or other.dice > one.dice)
            for other in ways
        )

    return [replace(way, front=not beaten(way)) for way in ways]


def check_models(models: Sequence[Path]) -> None:
    """Read what each model says of itself.

    Raises
    ------
    ArtifactError
        One cannot be read.
    DataError
        One has other classes or grids than the first.
    """
    labels = [read_artifact(model).labels for model in models]
    for model, other in zip(models[1:], labels[1:], strict=True):
        if other != labels[0]:
            raise DataError(f"{model} has other classes or grids than {models[0]}: measure them one by one")


def read_truth(path: Path, files: Sequence[ImageFile], labels: Labels) -> Table:
    """Return the rows of the truth that the images have, each of them sound; it may hold more.

    Raises
    ------
    DataError
        It cannot be read, lacks an image, or a row is no RLE on the label grid.
    """
    truth = read_table(path, labels)
    keys = [(file.key, label) for file in files for label in labels.classes]
    for key in keys:
        name = f"{key[0]}_{key[1]}"
        if key not in truth:
            raise DataError(f"{path} has no row for {name}")
        try:
            rle_to_submit_grid(truth[key], labels)
        except RleError as error:
            raise DataError(f"{path}: {name}: {error}") from error
    return {key: truth[key] for key in keys}


def _judge(table: Table, reference: Table, labels: Labels, on_label_grid: bool) -> tuple[float, float]:
    scores, mismatches = [], 0
    for key, text in table.items():
        other = reference[key]
        theirs = rle_to_submit_grid(other, labels) if on_label_grid else rle_decode(other, labels.submit_grid)
        ours = rle_decode(text, labels.submit_grid)
        scores.append(dice(ours, theirs))
        mismatches += bool(ours.any()) != bool(theirs.any())
    return float(np.mean(scores)), mismatches / len(table)
