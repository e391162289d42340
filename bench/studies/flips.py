"""Dice of test-time augmentation: which flips, and whether to average their probabilities or their logits.

    python -m cloudrt.bench.studies.flips CHECKPOINT DATA --image-list runs/NAME/held_out.txt -o FILE.json

Averaging logits before they are enlarged needs one resize and one sigmoid instead of one for each view, but gives
another mean. Every Dice is out of fold, with rules chosen as `cloudrt tune` chooses them. The network must not have
been trained on the images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from cloudrt.data.folder import DataFolder, open_data
from cloudrt.images.image import load_image
from cloudrt.model.checkpoint import Checkpoint
from cloudrt.model.network import InferenceGraph
from cloudrt.model.network_config import VIEWS
from cloudrt.search.choose import assign_folds, choose_rules
from cloudrt.search.tables import THRESHOLDS, DiceTables, LabelledMaps, measure, min_areas_for
from cloudrt.system.progress import progress_bar

from .results import save

WAYS = tuple(
    (views, mean) for views in VIEWS for mean in ("probabilities", "logits") if mean != "logits" or views != "none"
)
BATCH = 8


def answer(
    graph: InferenceGraph, images: torch.Tensor
) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor | None]]:
    """Return the levels and presence of (N, 3, H, W) float32 images for each of `WAYS`; each view is computed once."""
    normalised = (images - graph.mean) / graph.std
    logits, heads = {}, {}
    for view in VIEWS["hv"]:
        found = graph.network(normalised.flip(view) if view else normalised)
        one, head = found if isinstance(found, tuple) else (found, None)
        logits[view], heads[view] = (one.flip(view) if view else one), head
    outputs: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor | None]] = {}
    for name, mean in WAYS:
        chosen = VIEWS[name]
        presence = None
        if mean == "logits":
            probability = torch.sigmoid(graph.enlarge(_mean([logits[view] for view in chosen])))
        else:
            probability = _mean([torch.sigmoid(graph.enlarge(logits[view])) for view in chosen])
        given = [head for view in chosen if (head := heads[view]) is not None]
        if given:
            presence = torch.sigmoid(_mean(given)) if mean == "logits" else _mean([torch.sigmoid(one) for one in given])
        if graph.subtract_no_data:
            probability = probability * graph._has_data(images)
        levels = graph.quantise_outputs(probability, presence)
        outputs[name, mean] = levels if isinstance(levels, tuple) else (levels, None)
    return outputs


def _mean(values: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(values)).mean(0)


def measure_flips(checkpoint: Checkpoint, data: DataFolder, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the out-of-fold Dice of each of `WAYS`, and its difference from one view, with standard errors."""
    graph = InferenceGraph(checkpoint.network(), checkpoint.config).eval()
    rows = data.read_train()
    kept: dict[tuple[str, str], list[LabelledMaps]] = {way: [] for way in WAYS}
    with torch.inference_mode(), progress_bar("Computing views", len(names)) as advance:
        for begin in range(0, len(names), BATCH):
            some = names[begin : begin + BATCH]
            images = np.stack([load_image(data.train_images / name, checkpoint.config.input_size) for name in some])
            found = answer(graph, torch.from_numpy(images).permute(0, 3, 1, 2).float())
            truths = [data.truth_bits(name, rows[name]) for name in some]
            for way, (levels, presence) in found.items():
                certain: Iterator[Any] = iter(presence.numpy() if presence is not None else [None] * len(some))
                kept[way] += [
                    LabelledMaps(one, truth, next(certain)) for one, truth in zip(levels.numpy(), truths, strict=True)
                ]
            advance(len(some))
    areas = min_areas_for(data.labels.submit_grid)
    dice = {}
    with progress_bar("Choosing rules", len(WAYS)) as advance:
        for way, maps in kept.items():
            dice[way] = score_images(measure(maps, len(maps), THRESHOLDS, areas))
            advance(1)
    one_view = dice["none", "probabilities"]
    return [
        {
            "views": name,
            "mean": mean,
            "dice": float(dice[name, mean].mean()),
            "gain": float((dice[name, mean] - one_view).mean()),
            "error": float((dice[name, mean] - one_view).std(ddof=1) / np.sqrt(len(one_view))),
        }
        for name, mean in WAYS
    ]


def score_images(tables: DiceTables, seed: int = 0) -> NDArray[np.float64]:
    """Return the Dice of each image, (N,), the mean over the classes, with rules chosen without the image's fold."""
    fold = assign_folds(tables.dice.shape[1], seed=seed)
    dice = np.empty((len(tables.dice), len(fold)))
    for label, choice in enumerate(choose_rules(tables, seed=seed)):
        for number, rule in enumerate(choice.fold_rules):
            dice[label, fold == number] = tables.of_rule(label, rule)[fold == number]
    scores: NDArray[np.float64] = dice.mean(axis=0)
    return scores


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--image-list", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON file.")
def flips(checkpoint: Path, data: Path, image_list: Path, output: Path | None) -> None:
    """Measure the Dice of flips and of both means with CHECKPOINT on the listed images of DATA."""
    names = image_list.read_text(encoding="utf-8").splitlines()
    found = measure_flips(Checkpoint.load(checkpoint), open_data(data), names)
    save({"images": len(names), "ways": found}, output, "torch")


if __name__ == "__main__":
    flips()
