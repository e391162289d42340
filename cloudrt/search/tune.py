"""Search of the rules of an artifact on labelled images: the library behind `cloudrt tune`.

    artifact and images, or stored probabilities -> maps -> exact tables -> choice -> the artifact with new rules

The network must not have been trained on the images: predictions on training images are overconfident.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import numpy as np

from cloudrt.data.folder import DataFolder
from cloudrt.errors import DataError
from cloudrt.images.image import ImageFile
from cloudrt.labels import Labels
from cloudrt.masks.rule import Rule
from cloudrt.model.artifact import Artifact, write_metadata
from cloudrt.model.inferred import Inferred
from cloudrt.model.onnx_file import artifact_bytes, load_with_content
from cloudrt.search.choose import FOLDS, RuleChoice, RuleScore, choose_rules, score_rule
from cloudrt.search.probabilities import write_probabilities
from cloudrt.search.tables import THRESHOLDS, DiceTables, LabelledMaps, measure, min_areas_for
from cloudrt.system.files import replacing
from cloudrt.system.overlap import overlap
from cloudrt.system.progress import ProgressBar


class MapSource(Protocol):
    """A source of probability maps: a `Segmenter`, which runs the network, or `Probabilities`."""

    @property
    def labels(self) -> Labels:
        """Classes and grids of the maps."""
        ...

    def infer(self, files: Sequence[ImageFile]) -> Iterator[Inferred]:
        """Yield the network's output for each image, in order."""
        ...


@dataclass(frozen=True)
class Disagreement:
    """An image and class whose label and prediction disagree.

    Parameters
    ----------
    image, label
        Name of the image, and of the class.
    loss
        Mean binary cross-entropy of the pixels, in nats.
    dice
        Dice with the chosen rule.
    labelled
        Fraction of the image that the label covers.
    """

    image: str
    label: str
    loss: float
    dice: float
    labelled: float


@dataclass(frozen=True)
class Tuned:
    """The result of tuning.

    Parameters
    ----------
    labels
        Classes and grids.
    tables
        Dice of every rule on every image.
    choices
        The choices, one per class: a new rule if it is better than the previous rule, else the previous rule.
    before
        The previous rules and their scores, one per class; empty if there were none.
    names
        Names of the images used, in the order of the tables.
    failures
        Name -> reason, of the images that were not used.
    seconds
        Time to choose the rules from the tables.
    """

    labels: Labels
    tables: DiceTables
    choices: list[RuleChoice]
    before: list[tuple[Rule, RuleScore]]
    names: tuple[str, ...]
    failures: dict[str, str]
    seconds: float

    @property
    def images(self) -> int:
        """Number of images used."""
        return len(self.names)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The chosen rules, one per class."""
        return tuple(choice.rule for choice in self.choices)

    @property
    def out_of_fold(self) -> float:
        """Cross-validated Dice, the mean over the classes."""
        return sum(choice.out_of_fold for choice in self.choices) / len(self.choices)

    def disagreements(self, count: int = 200) -> list[Disagreement]:
        """Return the images and classes with the highest loss, highest first: candidates for labelling errors."""
        dice = np.stack([self.tables.of_rule(label, choice.rule) for label, choice in enumerate(self.choices)])
        order = np.argsort(-self.tables.loss, axis=None, kind="stable")[:count]
        return [
            Disagreement(
                self.names[image],
                self.labels.classes[label],
                float(self.tables.loss[label, image]),
                float(dice[label, image]),
                float(self.tables.true_pixels[label, image] / self.tables.pixels),
            )
            for label, image in zip(*np.unravel_index(order, self.tables.loss.shape), strict=True)
        ]


@dataclass(frozen=True)
class TuneOptions:
    """Options of the search.

    Parameters
    ----------
    before
        The previous rules, one per class; their thresholds and min areas are searched too. A previous rule is kept
        unless the new one is better; see `choose_rules`.
    thresholds
        Levels 0..255 to try.
    min_areas
        Min areas to try, in pixels; None uses `min_areas_for` the grid.
    folds
        Number of folds of the cross-validation.
    threads
        Number of threads of the search.
    """

    before: Sequence[Rule] = ()
    thresholds: Sequence[int] = THRESHOLDS
    min_areas: Sequence[int] | None = None
    folds: int = FOLDS
    threads: int = 1


def tune(
    source: MapSource,
    data: DataFolder,
    names: Sequence[str],
    options: TuneOptions,
    *,
    save: Path | None = None,
    bar: ProgressBar,
) -> Tuned:
    """Find the rules on labelled images by exact search.

    Parameters
    ----------
    source
        The probability maps.
    data
        The labelled images.
    names
        The images to use.
    options
        Options of the search.
    save
        File to store the probabilities in, if given.
    bar
        Opens a progress bar.

    Raises
    ------
    DataError
        Different classes or grids of source and data, a name that is not in train.csv, a malformed RLE, fewer than two
        images that can be used.
    """
    if source.labels != data.labels:
        raise DataError(
            f"classes or grids differ: the maps have {source.labels.to_dict()}, the data {data.labels.to_dict()}"
        )
    rows = data.read_train()
    require_rows(data, rows, names)
    before, threads = options.before, options.threads
    areas = options.min_areas if options.min_areas is not None else min_areas_for(data.labels.submit_grid)
    files = [ImageFile(name, data.train_images / name) for name in dict.fromkeys(names)]
    failures: dict[str, str] = {}

    with ExitStack() as stack:
        writer = stack.enter_context(write_probabilities(save, data.labels)) if save else None
        pool = stack.enter_context(ThreadPoolExecutor(threads, "truth"))
        advance = stack.enter_context(bar("Tuning", len(files)))

        def label(inferred: Inferred) -> tuple[Inferred, LabelledMaps | None]:
            if inferred.probability is None:
                return inferred, None
            truth = data.truth_bits(inferred.image, rows[inferred.image])
            return inferred, LabelledMaps(inferred.probability, truth, inferred.presence)

        def maps() -> Iterator[LabelledMaps]:
            for inferred, one in overlap(pool, label, source.infer(files), 2 * threads):
                if one is None:
                    failures[inferred.image] = inferred.error or ""
                    advance(1)
                    continue
                if writer:
                    writer.keep(inferred)
                yield one

        def too_few(found: int) -> DataError:
            first = next(iter(failures.items()), ("", ""))
            left = f"; {len(failures)} were left out, first {first[0]} {first[1]}" if failures else ""
            return DataError(f"tuning needs at least two images, found {found}{left}")

        tables = measure(
            _some(maps(), too_few),
            len(files),
            [*options.thresholds, *(rule.threshold for rule in before)],
            [*areas, *(rule.min_area for rule in before)],
            threads,
            advance,
        )
        if tables.dice.shape[1] < 2:
            raise too_few(1)
    began = time.perf_counter()
    choices = choose_rules(tables, options.folds, before=before)
    seconds = time.perf_counter() - began
    scored = [(rule, score_rule(tables, c, rule)) for c, rule in enumerate(before)]
    used = tuple(file.key for file in files if file.key not in failures)
    return Tuned(data.labels, tables, choices, scored, used, failures, seconds)


def require_rows(data: DataFolder, rows: Container[str], names: Sequence[str]) -> None:
    """Raise DataError if one of the names of images is not in `rows`, from `data.read_train`."""
    lacking = [name for name in names if name not in rows]
    if lacking:
        raise DataError(f"{data.train_csv} has no row of {lacking[0]} ({len(lacking)} of {len(names)} images)")


def _some(maps: Iterator[LabelledMaps], too_few: Callable[[int], DataError]) -> Iterator[LabelledMaps]:
    """Yield the maps; raise if there are none."""
    found = 0
    for one in maps:
        found += 1
        yield one
    if not found:
        raise too_few(0)


def tuned_artifact(artifact: Artifact, tuned: Tuned) -> Artifact:
    """Return the metadata of the artifact with the new rules."""
    return replace(
        artifact,
        rules=tuned.rules,
        validation_dice=tuned.out_of_fold,
        tuning={
            "images": tuned.images,
            "dice": sum(choice.score.dice for choice in tuned.choices) / len(tuned.choices),
            "out_of_fold_dice": tuned.out_of_fold,
            "standard_errors": [choice.error for choice in tuned.choices],
        },
    )


def write_disagreements(tuned: Tuned, output: Path) -> None:
    """Write a CSV file of `Tuned.disagreements`: image, class, loss, dice, labelled. Replaced atomically."""
    with replacing(output) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "class", "loss", "dice", "labelled"])
        for one in tuned.disagreements():
            writer.writerow([one.image, one.label, f"{one.loss:.4f}", f"{one.dice:.4f}", f"{one.labelled:.4f}"])


def write_tuned(model: Path, artifact: Artifact, digest: str, tuned: Tuned, output: Path) -> None:
    """Write an artifact with the new rules and the same graph.

    Parameters
    ----------
    model
        The artifact to copy.
    artifact
        Its metadata.
    digest
        Its SHA-256 when it was tuned.
    tuned
        The new rules.
    output
        Path of the copy; replaced atomically.

    Raises
    ------
    DataError
        The file was replaced since.
    """
    copy, content = load_with_content(model)
    if sha256(content).hexdigest() != digest:
        raise DataError(f"{model} was replaced while its rules were searched: run the command again")
    write_metadata(copy, tuned_artifact(artifact, tuned))
    with replacing(output) as partial:
        partial.write_bytes(artifact_bytes(copy))
