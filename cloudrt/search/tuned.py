"""The result of tuning, and its files: the artifact with the new rules, and the list of disagreements."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from cloudrt.errors import DataError
from cloudrt.labels import Labels
from cloudrt.masks.rule import Rule
from cloudrt.model.artifact import Artifact, write_metadata
from cloudrt.model.onnx_file import artifact_bytes, load_with_content
from cloudrt.search.choose import RuleChoice, RuleScore
from cloudrt.search.tables import DiceTables
from cloudrt.system.files import replacing


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
