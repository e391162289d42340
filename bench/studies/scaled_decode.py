"""How decoding at a reduced scale changes the Dice: the same network and rules with both decodes.

    python -m cloudrt.bench.studies.scaled_decode MODEL IMAGES [TRUTH.csv] -o FILE.json

`full` decodes every pixel and resizes. `scaled` is what cloudrt does: decode at the smallest DCT scale of libjpeg-turbo
that is at least as large as the network's input, then the same resize.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from cloudrt.images.image import Image, ImageFile, decode, find_images, load_image
from cloudrt.images.resize import resize
from cloudrt.inference.pipeline import Segmenter
from cloudrt.labels import Grid
from cloudrt.masks.metric import dice
from cloudrt.masks.rle import rle_to_submit_grid
from cloudrt.masks.table import Table, read_table

from .results import save


def compare(segmenter: Segmenter, files: Sequence[ImageFile], truth: Table | None) -> dict[str, Any]:
    """Compare both decodes over every (image, class).

    Parameters
    ----------
    segmenter
        The model.
    files
        The images.
    truth
        (key, class) -> RLE on the label grid, as in train.csv.
    """
    labels, size = segmenter.labels, segmenter.artifact.input_size
    pixels, between, empty = 0.0, [], 0
    scores: dict[str, list[float]] = {"scaled": [], "full": []}
    scaled = segmenter.predict(load_image(file.path, size) for file in files)
    full = segmenter.predict(decode_full(file, size) for file in files)
    for file, ours, whole in zip(files, scaled, full, strict=True):
        pixels += float(np.abs(load_image(file.path, size).astype(int) - decode_full(file, size)).mean())
        for label in labels.classes:
            masks = {"scaled": ours.mask(label), "full": whole.mask(label)}
            between.append(dice(masks["scaled"], masks["full"]))
            empty += masks["scaled"].any() != masks["full"].any()
            if truth is not None:
                real = rle_to_submit_grid(truth.get((file.key, label), ""), labels)
                for way, mask in masks.items():
                    scores[way].append(dice(mask, real))
    found: dict[str, Any] = {
        "images": len(files),
        "image_size": list(decode(files[0].path.read_bytes()).shape[:2]),
        "input_size": list(size),
        "mean_pixel_difference": pixels / len(files),
        "dice_between": float(np.mean(between)),
        "empty_in_one_only": empty / len(between),
    }
    if truth is not None:
        difference = np.subtract(scores["scaled"], scores["full"])
        found |= {f"dice_{way}": float(np.mean(values)) for way, values in scores.items()}
        found["standard_error_of_the_difference"] = float(difference.std(ddof=1) / len(difference) ** 0.5)
    return found


def decode_full(file: ImageFile, size: Grid) -> Image:
    """Decode every pixel, then resize."""
    return resize(decode(file.path.read_bytes()), size)


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.argument("images", type=click.Path(path_type=Path, exists=True))
@click.argument("truth", required=False, type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(model: Path, images: Path, truth: Path | None, output: Path | None) -> None:
    """Compare the two decodes on IMAGES and, with TRUTH, their scores."""
    with Segmenter(model) as segmenter:
        table = read_table(truth, segmenter.labels) if truth else None
        found = compare(segmenter, find_images(images), table)
    save({"model": model.name, **found}, output)


if __name__ == "__main__":
    main()
