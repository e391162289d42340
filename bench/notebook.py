"""The notebook's way: the pipeline of the competition's notebooks, without optimisation.

One image at a time: full decode and resize, the network at batch 1, resize to the submission grid, sigmoid, threshold,
a loop over the connected components, RLE by NumPy differences, a row of CSV. Its bugs are fixed, so that it computes
the same rows as cloudrt from the same probabilities.

The network is PyTorch in float32 if a checkpoint is given, as in the notebook, else a plain ONNX Runtime session on the
artifact. The two return the probability in different forms, and `rle_rows` takes both:

    PyTorch        (C, H, W) float32 in 0..1
    ONNX Runtime   (C, H, W) uint8 levels 0..255, a transposed view of the artifact's (C, W, H)
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import ImageError
from cloudrt.images.image import NO_DATA_LEVEL, Image, ImageFile
from cloudrt.labels import Grid
from cloudrt.masks.rule import Rule
from cloudrt.model.artifact import Artifact

Probability = NDArray[Any]
"""(C, H, W) on the submission grid: float32 in 0..1, or uint8 levels 0..255."""
Presence = NDArray[np.uint8] | None
"""(C,) levels 0..255; None for a network without that output."""


class Network(Protocol):
    """A function that runs the network on one image; `name` is shown in the tables."""

    name: str

    def __call__(self, image: Image) -> tuple[Probability, Presence]:
        """Return the probability and the presence of one (H, W, 3) uint8 RGB image."""
        ...


def has_data(image: Image, grid: Grid) -> NDArray[np.bool_]:
    """Return (H, W) bool on the submission grid: whether the image has data there.

    The notebook has no such step; without it, the masks would differ from those of an artifact that has it.
    """
    bright = (image.max(axis=2) > NO_DATA_LEVEL).astype(np.float32)
    inside = cv2.boxFilter(np.ones_like(bright), -1, (5, 5), normalize=False, borderType=cv2.BORDER_CONSTANT)
    share = cv2.boxFilter(bright, -1, (5, 5), normalize=False, borderType=cv2.BORDER_CONSTANT) / inside
    return np.asarray(cv2.resize(share, grid[::-1], interpolation=cv2.INTER_LINEAR) >= 0.5)


def read_image(path: Path, size: Grid) -> Image:
    """Decode the whole file, then resize it: (H, W, 3) uint8 RGB.

    Raises
    ------
    ImageError
        OpenCV cannot read it.
    """
    image = cv2.imread(str(path))
    if image is None:
        raise ImageError("OpenCV cannot read it")
    image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return np.asarray(cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR), np.uint8)


def post_process(probability: NDArray[Any], threshold: float, min_area: int) -> NDArray[np.float32]:
    """Return the (H, W) mask of one class: the components above the threshold with more than `min_area` pixels."""
    mask = (probability > threshold).astype(np.uint8)
    count, components = cv2.connectedComponents(mask)
    kept = np.zeros(mask.shape, np.float32)
    for number in range(1, count):
        component = components == number
        if component.sum() > min_area:
            kept[component] = 1
    return kept


def mask_to_rle(mask: NDArray[Any]) -> str:
    """Return the RLE text of an (H, W) mask of 0 and 1."""
    pixels = np.concatenate([[0], mask.T.flatten(), [0]])
    runs = np.where(pixels[1:] != pixels[:-1])[0] + 1
    runs[1::2] -= runs[::2]
    return " ".join(str(number) for number in runs)


def is_empty(rule: Rule, levels: NDArray[Any], presence: int | None) -> bool:
    """Return whether a rule makes a class empty because of its presence or of too few confident pixels."""
    absent = presence is not None and presence < rule.presence
    return bool(absent or (levels > cut(rule.gate_threshold, levels)).sum() < rule.gate_pixels)


def rle_rows(probability: Probability, rules: Sequence[Rule], presence: Presence = None) -> list[str]:
    """Return the RLE text of each class of one image."""
    texts = []
    for index, rule in enumerate(rules):
        one = probability[index]
        kept = post_process(one, cut(rule.threshold, one), rule.min_area)
        empty = is_empty(rule, one, None if presence is None else int(presence[index]))
        texts.append("" if empty else mask_to_rle(kept))
    return texts


def cut(level: int, probability: NDArray[Any]) -> float:
    """Return a rule's threshold in the unit of `probability`: p exceeds it where round(p * 255) exceeds `level`."""
    return level if probability.dtype == np.uint8 else (level + 0.5) / 255


RowMaker = Callable[[Probability, Sequence[Rule], Presence], list[str]]


def write_submission(
    path: Path, files: Iterable[ImageFile], network: Network, artifact: Artifact, make_rows: RowMaker = rle_rows
) -> None:
    """Predict one file after another and write each row at once.

    Parameters
    ----------
    path
        The CSV file.
    files
        The images.
    network
        Runs the network.
    artifact
        Sets input size, classes and rules.
    make_rows
        Post-processing: probability, rules and presence -> one text per class.
    """
    labels = artifact.labels
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(labels.header)
        for image in files:
            probability, presence = network(read_image(image.path, artifact.input_size))
            for label, text in zip(labels.classes, make_rows(probability, artifact.rules, presence), strict=True):
                rows.writerow([f"{image.key}_{label}", text])
