"""Dice lost by choosing rules on few held-out images.

    python -m cloudrt.bench.studies.held_out PROBABILITIES DATA -o FILE.json

PROBABILITIES is from `cloudrt-infer --save-probabilities` on images that the network was not trained on, and DATA has
their labels. In each repetition, a fifth of the images is set aside; rules are chosen on the first n of the others as
`cloudrt tune` chooses them, and scored on the images set aside. The loss is relative to rules chosen on all of the
others, in the same repetition.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from cloudrt.data.folder import open_data
from cloudrt.search.choose import choose_rules, score_rule
from cloudrt.search.probabilities import Probabilities, labelled_maps
from cloudrt.search.tables import THRESHOLDS, DiceTables, measure, min_areas_for
from cloudrt.system.progress import progress_bar

from .results import save

COUNTS = (50, 100, 200, 300, 400, 600)


def take(tables: DiceTables, images: NDArray[np.int_]) -> DiceTables:
    """Return the tables of some of the images."""
    return replace(
        tables,
        dice=np.ascontiguousarray(tables.dice[:, images]),
        true_pixels=tables.true_pixels[:, images],
        above=tables.above[:, images],
        loss=tables.loss[:, images],
        presence=None if tables.presence is None else tables.presence[:, images],
    )


def score_choice(tables: DiceTables, chosen_on: NDArray[np.int_], unseen: NDArray[np.int_]) -> float:
    """Return the mean Dice on `unseen` of the rules chosen on `chosen_on`."""
    choices = choose_rules(take(tables, chosen_on))
    rest = take(tables, unseen)
    return float(np.mean([score_rule(rest, label, choice.rule).dice for label, choice in enumerate(choices)]))


def measure_losses(tables: DiceTables, repetitions: int, seed: int = 0) -> dict[str, Any]:
    """Return the mean Dice on unseen images, and the loss and its standard error, for each number of images."""
    images = tables.dice.shape[1]
    random = np.random.default_rng(seed)
    rest = images - images // 5
    counts = [count for count in COUNTS if count < rest] + [rest]
    dice = np.empty((repetitions, len(counts)))
    with progress_bar("Choosing rules", dice.size) as advance:
        for row in dice:
            order = random.permutation(images)
            for index, count in enumerate(counts):
                row[index] = score_choice(tables, order[:count], order[rest:])
                advance(1)
    lost = dice[:, -1:] - dice
    error = lost.std(axis=0, ddof=1) / np.sqrt(repetitions)
    rows = [
        {"images": count, "dice": float(mean), "lost": float(loss), "error": float(deviation)}
        for count, mean, loss, deviation in zip(counts, dice.mean(axis=0), lost.mean(axis=0), error, strict=True)
    ]
    return {"images": images, "repetitions": repetitions, "counts": rows}


@click.command()
@click.argument("probabilities", type=click.Path(path_type=Path, exists=True))
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--repetitions", default=20, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(probabilities: Path, data: Path, repetitions: int, output: Path | None) -> None:
    """Measure the Dice that is lost by choosing rules on few images."""
    source = open_data(data)
    with Probabilities(probabilities) as kept, progress_bar("Measuring", len(kept.keys)) as advance:
        areas = min_areas_for(source.labels.submit_grid)
        tables = measure(labelled_maps(kept, source), len(kept.keys), THRESHOLDS, areas, advance=advance)
    save(measure_losses(tables, repetitions), output)


if __name__ == "__main__":
    main()
