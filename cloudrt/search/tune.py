"""Search of the rules of an artifact on labelled images: the library behind `cloudrt tune`.

    artifact and images, or stored probabilities -> maps -> exact tables -> choice -> the artifact with new rules

The network must not have been trained on the images: predictions on training images are overconfident.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cloudrt.arguments import check_whole
from cloudrt.data.folder import DataFolder
from cloudrt.errors import DataError
from cloudrt.images.image import ImageFile
from cloudrt.labels import Labels
from cloudrt.masks.rule import Rule
from cloudrt.model.inferred import Inferred
from cloudrt.search.choose import FOLDS, choose_rules, score_rule
from cloudrt.search.probabilities import write_probabilities
from cloudrt.search.tables import THRESHOLDS, LabelledMaps, measure, min_areas_for
from cloudrt.search.tuned import Tuned
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
        Different classes or grids of source and data, a name that is not in the data set, a malformed RLE, fewer than
        two images that can be used, or an option out of range.
    """
    if source.labels != data.labels:
        raise DataError(
            f"classes or grids differ: the maps have {source.labels.to_dict()}, the data {data.labels.to_dict()}"
        )
    rows = data.read_train()
    require_rows(data, rows, names)
    before, threads = options.before, options.threads
    check_whole("threads", threads, 1, 1024)
    check_whole("folds", options.folds, 2, 2**31)
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
