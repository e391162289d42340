"""Cross-validation: a run a fold, and rules that are chosen on what each network said of images it had not seen.

runs/NAME/fold-0 ... fold-K   a run each, with held_out.npz
runs/NAME/oof.npz             all of those: what `cloudrt tune` reads
runs/NAME/folds.json          what they score
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cloudrt.data.folder import open_data
from cloudrt.errors import DataError
from cloudrt.labels import Labels
from cloudrt.model.network import Checkpoint
from cloudrt.search.choose import choose_rules
from cloudrt.search.probabilities import Probabilities, write_probabilities
from cloudrt.search.tables import THRESHOLDS, LabelledMaps, measure, min_areas_for
from cloudrt.system.files import replacing

from .config import TrainConfig
from .loop import PROBABILITIES, Bar, no_bar, train
from .start import STATE

logger = logging.getLogger(__name__)

OUTCOME = "fold.json"
"""What a fold scored by its own rules; made when it is finished."""


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
    if resume and (folder / "folds.json").exists():
        raise DataError(f"{folder} is finished: give another --name, or --overwrite")
    if not resume:
        for old in (*folder.glob("fold-*"), folder / "oof.npz", folder / "folds.json"):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    dices, empty = [], []
    parts = [folder / f"fold-{number}" for number in range(config.folds)]
    for number, part in enumerate(parts):
        one = replace(config, fold=number)
        if resume and (part / OUTCOME).exists():
            done = _read_outcome(part, one)
        else:
            logger.info("fold %d of %d", number + 1, config.folds)
            unfinished = resume and (part / STATE).exists()
            result = train(one, data, part, cache_root, bar, resume=unfinished)
            done = {"dice": result.dice, "all_empty": result.all_empty}
            with replacing(part / OUTCOME) as path:
                path.write_text(json.dumps(done) + "\n", encoding="utf-8")
        dices.append(done["dice"])
        empty.append(done["all_empty"])
    source = open_data(data)
    merge([part / PROBABILITIES for part in parts], folder / "oof.npz", source.labels)
    table = source.read_train()
    with Probabilities(folder / "oof.npz") as kept:
        maps = (
            LabelledMaps(levels, source.truth_bits(key, table[key]), presence)
            for key in kept.keys
            for levels, presence in [kept.read(key)]
        )
        choices = choose_rules(measure(maps, len(kept.keys), THRESHOLDS, min_areas_for(source.labels.submit_grid)))
    dice = float(np.mean([choice.out_of_fold for choice in choices]))
    for part in parts:
        best = Checkpoint.load(part / "best.pth")
        replace(best, rules=tuple(choice.rule for choice in choices), dice=dice).save(part / "best.pth")
    crossed = CrossResult(dice, tuple(dices), float(np.mean(empty)))
    with replacing(folder / "folds.json") as path:
        values = {"dice": crossed.dice, "folds": list(crossed.folds), "all_empty": crossed.all_empty}
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return crossed


def _read_outcome(part: Path, config: TrainConfig) -> dict[str, float]:
    """Return what a finished fold scored.

    Raises
    ------
    DataError
        It was trained with other options, named.
    """
    differences = config.differences(json.loads((part / "config.json").read_text(encoding="utf-8")))
    if differences:
        raise DataError(f"{part} is another run: {'; '.join(differences)}. Give its options, or --overwrite")
    outcome: dict[str, float] = json.loads((part / OUTCOME).read_text(encoding="utf-8"))
    return outcome


def merge(files: list[Path], target: Path, labels: Labels) -> None:
    """Write all images of several files of probabilities into one.

    Raises
    ------
    DataError
        An image is in two of them.
    """
    seen: set[str] = set()
    with write_probabilities(target, labels) as writer:
        for file in files:
            with Probabilities(file) as kept:
                for key in kept.keys:
                    if key in seen:
                        raise DataError(f"{key} was held out twice: the data changed between the folds; --overwrite")
                    seen.add(key)
                    writer.add(key, *kept.read(key))
