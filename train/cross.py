"""Cross-validation: one run per fold, and rules chosen on the held-out predictions of all folds.

runs/NAME/fold-0, fold-1 ...   one run per fold, with held_out.npz
runs/NAME/oof.npz              the held-out probabilities of all folds, as `cloudrt tune` reads them
runs/NAME/folds.json           the scores
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cloudrt.data.folder import open_data
from cloudrt.errors import DataError
from cloudrt.labels import Labels
from cloudrt.model.checkpoint import Checkpoint
from cloudrt.search.choose import choose_rules
from cloudrt.search.probabilities import Probabilities, labelled_maps, write_probabilities
from cloudrt.search.tables import THRESHOLDS, measure, min_areas_for
from cloudrt.system.files import locked, replacing
from cloudrt.system.progress import ProgressBar, no_progress

from .config import TrainConfig
from .distributed import is_distributed
from .loop import BUSY, LOCK, train
from .run_files import CROSS_RESULTS, PROBABILITIES, RUN_RESULTS, RUN_STARTS, STATE, TENSORBOARD
from .start import check_inputs, digest_inputs

logger = logging.getLogger(__name__)

OUTCOME = "fold.json"
"""The scores of a complete fold, with its own rules; written at its end."""


@dataclass(frozen=True)
class CrossResult:
    """The scores of a cross-validation.

    Parameters
    ----------
    dice
        Out-of-fold mean Dice over all images: neither the weights nor the rules were fitted to the image. The best
        epoch and the treatment of no-data were chosen on the same held-out images.
    folds
        Held-out mean Dice of each run, with its own rules.
    all_empty
        Mean Dice if all rows are empty.
    """

    dice: float
    folds: tuple[float, ...]
    all_empty: float


def cross_validate(
    config: TrainConfig,
    data: Path,
    folder: Path,
    cache_root: Path,
    bar: ProgressBar = no_progress,
    *,
    resume: bool = False,
) -> CrossResult:
    """Train one network per fold, then choose the rules on all held-out predictions and store them in each best.pth.

    With `resume`, complete folds are kept and the interrupted one is continued.

    Raises
    ------
    DataError
        There is more than one process, or another process writes to the folder; see also `train`.
    """
    if is_distributed():
        raise DataError("--folds trains all folds in one process: with several, train one fold with --fold")
    with locked(folder / LOCK, BUSY):
        return _cross_validate(config, data, folder, cache_root, bar, resume)


def _cross_validate(
    config: TrainConfig, data: Path, folder: Path, cache_root: Path, bar: ProgressBar, resume: bool
) -> CrossResult:
    if resume and (folder / "folds.json").exists():
        raise DataError(f"{folder} is finished: there is nothing to resume; to train again, use another --name")
    if resume and any((folder / name).exists() for name in (STATE, "best.pth")):
        raise DataError(f"{folder} is a single run: resume it with its own options, or use another --name")
    digests = digest_inputs(config)
    dices, empty = [], []
    parts = [folder / f"fold-{number}" for number in range(config.folds)]
    earlier: list[Path] = []
    if not resume:
        others = (old for old in folder.glob("fold-[0-9]*") if old != parts[0])
        own = (old for old in parts[0].glob("*") if old.name != LOCK)
        names = (*CROSS_RESULTS, *RUN_RESULTS, TENSORBOARD, *RUN_STARTS)
        earlier = [*(folder / name for name in names), *others, *own]
    for number, part in enumerate(parts):
        one = replace(config, fold=number)
        unfinished = resume and (part / STATE).exists()
        if resume and not unfinished and (part / "best.pth").exists():
            check_inputs(part, digests)
            done = _read_outcome(part, one)
        else:
            logger.info("fold %d of %d", number + 1, config.folds)
            result = train(one, data, part, cache_root, bar, resume=unfinished, replaces=() if number else earlier)
            done = {"dice": result.dice, "all_empty": result.all_empty}
        with replacing(part / OUTCOME) as path:
            path.write_text(json.dumps(done) + "\n", encoding="utf-8")
        dices.append(done["dice"])
        empty.append(done["all_empty"])
    source = open_data(data)
    merge([part / PROBABILITIES for part in parts], folder / "oof.npz", source.labels)
    with Probabilities(folder / "oof.npz") as kept:
        choices = choose_rules(
            measure(labelled_maps(kept, source), len(kept.keys), THRESHOLDS, min_areas_for(source.labels.submit_grid))
        )
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
    """Return the scores of a complete fold; those of its best.pth if the process was killed before it wrote `OUTCOME`.

    Raises
    ------
    DataError
        The fold was trained with other options; the message names them.
    """
    differences = config.differences(json.loads((part / "config.json").read_text(encoding="utf-8")))
    if differences:
        raise DataError(f"{part} had other options: {'; '.join(differences)}; use the same, or --overwrite")
    if not (part / OUTCOME).exists():
        best = Checkpoint.load(part / "best.pth")
        return {"dice": best.dice, "all_empty": best.history[-1]["all_empty"]}
    outcome: dict[str, float] = json.loads((part / OUTCOME).read_text(encoding="utf-8"))
    return outcome


def merge(files: list[Path], target: Path, labels: Labels) -> None:
    """Merge several files of stored probabilities into one.

    Raises
    ------
    DataError
        An image is in more than one file.
    """
    seen: set[str] = set()
    with write_probabilities(target, labels) as writer:
        for file in files:
            with Probabilities(file) as kept:
                for key in kept.keys:
                    if key in seen:
                        raise DataError(f"{key} was held out twice: the data changed between folds; use --overwrite")
                    seen.add(key)
                    writer.add(key, *kept.read(key))
