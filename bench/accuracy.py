"""Speed and accuracy: the rate of each model in each provider, from files to CSV, and the Dice of its submission.

With a truth the score is the competition's Dice. Without one it is the Dice between the submission and that of a
reference: the first fp32 model, or the first model if there is none, in ONNX Runtime's CPU provider if that can run it.
A point is on the Pareto front if no other is at least as good in both and better in one.
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

from cloudrt.engines.choice import artifact_problem
from cloudrt.errors import CloudrtError, DataError, RleError
from cloudrt.images.image import ImageFile
from cloudrt.inference.pipeline import Segmenter
from cloudrt.inference.run import write_submission
from cloudrt.inference.task import InferTask
from cloudrt.labels import Labels
from cloudrt.masks.metric import dice
from cloudrt.masks.rle import rle_decode, rle_to_submit_grid
from cloudrt.masks.table import Table, read_table
from cloudrt.model.artifact import read_artifact
from cloudrt.options import PROVIDERS

from .stages import Timing

CHUNK = 64
"""Minimum number of images that a way runs before the next way's turn, if there are enough for two chunks."""
WARM_UP = 16

WAYS = tuple(reversed(PROVIDERS[1:]))
"""The providers, CPU first."""


@dataclass(frozen=True)
class Way:
    """A way to run: a model in a provider.

    Parameters
    ----------
    model, provider, precision
        The artifact, where it runs, and its precision.
    timing
        Seconds per image from files to CSV.
    dice
        Dice of its submission against the truth or the reference.
    empty_mismatch
        Share of rows empty in only one of the submission and the truth or reference.
    front
        Whether no other way is at least as good in speed and Dice, and better in one of them.
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
    """Figures of all ways.

    Parameters
    ----------
    against
        What the submissions are compared with.
    all_empty
        Score of a submission without any mask; None without a truth.
    ways
        The models and providers measured.
    skipped
        Those that cannot run: name -> reason.
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
    """Run every way (model and provider) over the images, alternating after each chunk, after a warm-up.

    Parameters
    ----------
    models
        Artifacts with the same classes and grids.
    files
        The images.
    truth
        Output of `read_truth`, or None.
    folder
        For the submissions.
    repeat
        Number of rounds if the images make a single chunk; more images run once.
    advance
        Called `rounds(models, files, repeat)` times: after each turn, and for the turns of ways that cannot run.

    Raises
    ------
    DataError
        No model runs in any provider.
    """
    labels = read_artifact(models[0]).labels
    chunks = _split(files, repeat)
    with ExitStack() as stack:
        segmenters, skipped = _open(models, stack)
        for _ in range((1 + len(chunks)) * len(skipped)):
            advance()
        if not segmenters:
            raise DataError(f"no model runs: {next(f'{way}: {reason}' for way, reason in skipped.items())}")
        names = list(segmenters)
        seconds: list[list[float]] = [[] for _ in names]
        tables: list[Table] = [{} for _ in names]
        for number, chunk in enumerate([files[:WARM_UP], *chunks]):
            for way, segmenter in enumerate(segmenters.values()):
                path = folder / f"way-{way}-{number}.csv"
                began = time.perf_counter()
                write_submission(segmenter, chunk, InferTask((), path))
                if number:
                    seconds[way].append((time.perf_counter() - began) / len(chunk))
                    tables[way] |= read_table(path, labels)
                advance()
        precisions = [segmenter.artifact.precision for segmenter in segmenters.values()]
    first = min(range(len(names)), key=lambda i: (names[i][1] != "cpu", precisions[i] != "fp32", i))
    name, where = names[first]
    reference = f"{name} in {'ONNX Runtime CPU' if where == 'cpu' else where}"
    against = reference if truth is None else "the truth"
    ways = []
    for (model_name, provider), table, precision, taken in zip(names, tables, precisions, seconds, strict=True):
        score, mismatch = _judge(table, truth or tables[first], labels, truth is not None)
        ways.append(Way(model_name, provider, precision, Timing(tuple(taken)), score, mismatch))
    all_empty = None
    if truth is not None:
        all_empty = float(np.mean([not rle_to_submit_grid(text, labels).any() for text in truth.values()]))
    return Accuracy(against, all_empty, mark_front(ways), skipped)


def _open(models: Sequence[Path], stack: ExitStack) -> tuple[dict[tuple[str, str], Segmenter], dict[str, str]]:
    """Open each model in each provider; return those that run, and the reasons why the others do not."""
    segmenters, skipped = {}, {}
    for model, name in zip(models, _tell_apart(models), strict=True):
        for provider in WAYS:
            reason = artifact_problem(provider, read_artifact(model))
            if reason is None:
                try:
                    segmenters[name, provider] = stack.enter_context(Segmenter(model, provider=provider))
                except CloudrtError as error:
                    reason = str(error)
            if reason is not None:
                skipped[f"{name}, {provider}"] = reason
    return segmenters, skipped


def _tell_apart(models: Sequence[Path]) -> list[str]:
    """Return the names of files, with enough of their folders to be unique."""
    for parts in range(1, max(len(model.parts) for model in models) + 1):
        names = ["/".join(model.parts[-parts:]) for model in models]
        if len(set(names)) == len(names):
            break
    return names


def rounds(models: Sequence[Path], files: Sequence[ImageFile], repeat: int) -> int:
    """Return the number of turns in `measure_accuracy`, those of ways that cannot run included."""
    return len(models) * len(WAYS) * (1 + len(_split(files, repeat)))


def _split(files: Sequence[ImageFile], repeat: int) -> list[Sequence[ImageFile]]:
    """Return chunks of nearly equal length, at least `CHUNK`, or all images `repeat` times if too few for two."""
    count = len(files) // CHUNK
    if count < 2:
        return [files] * repeat
    edges = [len(files) * number // count for number in range(count + 1)]
    return [files[begin:end] for begin, end in pairwise(edges)]


def mark_front(ways: Sequence[Way]) -> list[Way]:
    """Return the ways, with `front` set on the Pareto front of speed and Dice."""

    def beaten(one: Way) -> bool:
        return any(
            other.timing.median <= one.timing.median
            and other.dice >= one.dice
            and (other.timing.median < one.timing.median or other.dice > one.dice)
            for other in ways
        )

    return [replace(way, front=not beaten(way)) for way in ways]


def check_models(models: Sequence[Path]) -> None:
    """Check that all models can be read and have the same classes and grids.

    Raises
    ------
    ArtifactError
        A model cannot be read.
    DataError
        A model has other classes or grids than the first.
    """
    labels = [read_artifact(model).labels for model in models]
    for model, other in zip(models[1:], labels[1:], strict=True):
        if other != labels[0]:
            raise DataError(f"{model} has other classes or grids than {models[0]}: measure them one by one")


def read_truth(path: Path, files: Sequence[ImageFile], labels: Labels) -> Table:
    """Return the rows of a truth that belong to the images, which must all be valid; it may hold more rows.

    Raises
    ------
    DataError
        The table cannot be read, lacks an image, or a row is not valid RLE on the label grid.
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
