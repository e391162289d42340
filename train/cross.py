"""Cross-validation: a run a fold, and rules that are chosen on what each network said of images it had not seen.

runs/NAME/fold-0 ... fold-K   a run each, with held_out.npz
runs/NAME/oof.npz             all of those: what `cloudrt tune` reads
runs/NAME/folds.json          what they score
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cloudrt.choose import choose_rules
from cloudrt.data import open_data
from cloudrt.files import replacing
from cloudrt.labels import Labels
from cloudrt.network import Checkpoint
from cloudrt.probabilities import Probabilities, write_probabilities
from cloudrt.search import THRESHOLDS, LabelledMaps, measure, min_areas_for

from .config import TrainConfig
from .loop import PROBABILITIES, Bar, no_bar, train
from .start import STATE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CrossResult:
    """What cross-validation ends with.

    Parameters
    ----------
    dice
        Mean Dice over all images, by rules that had not seen them either.
    folds
        Of each run alone, by its own rules.
    all_empty
        Of predicting nothing.
    """

    dice: float
    folds: tuple[float, ...]
    all_empty: float


def cross_validate(
    config: TrainConfig, data: Path, folder: Path, cache_root: Path, bar: Bar = no_bar, *, resume: bool = False
) -> CrossResult:
    """Train each of `config.folds`, then choose one set of rules on all images, and store it with every network.

    With `resume`, folds that are finished stay, and the one that was cut short goes on.

    Raises
    ------
    DataError
        See `train`.
    """
    dices, empty = [], []
    parts = [folder / f"fold-{number}" for number in range(config.folds)]
    for number, part in enumerate(parts):
        if resume and (part / PROBABILITIES).exists() and not (part / STATE).exists():
            checkpoint = Checkpoint.load(part / "best.pth")
            dices.append(checkpoint.dice)
            empty.append(checkpoint.history[-1]["all_empty"])
            continue
        logger.info("fold %d of %d", number + 1, config.folds)
        result = train(replace(config, fold=number), data, part, cache_root, bar, resume=resume)
        dices.append(result.dice)
        empty.append(result.all_empty)
    source = open_data(data)
    merge([part / PROBABILITIES for part in parts], folder / "oof.npz", source.labels)
    table = source.read_train()
    with Probabilities(folder / "oof.npz") as kept:
        maps = (LabelledMaps(levels, source.truth_bits(key, table[key]), presence)
                for key in kept.keys for levels, presence in [kept.read(key)])  # fmt: skip
        choices = choose_rules(measure(maps, len(kept.keys), THRESHOLDS, min_areas_for(source.labels.submit_grid)))
    dice = float(np.mean([choice.out_of_fold for choice in choices]))
    for part in parts:
        best = Checkpoint.load(part / "best.pth")
        replace(best, rules=tuple(choice.rule for choice in choices), dice=dice).save(part / "best.pth")
    done = CrossResult(dice, tuple(dices), float(np.mean(empty)))
    with replacing(folder / "folds.json") as path:
        values = {"dice": done.dice, "folds": list(done.folds), "all_empty": done.all_empty}
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return done


def merge(files: list[Path], target: Path, labels: Labels) -> None:
    """Write all images of several files of probabilities into one."""
    with write_probabilities(target, labels) as writer:
        for file in files:
            with Probabilities(file) as kept:
                for key in kept.keys:
                    writer.add(key, *kept.read(key))
