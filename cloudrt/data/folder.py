"""A labelled data set in the competition's folder layout.

DATA/train.csv       Image_Label,EncodedPixels: one row `NAME.jpg_Class` per image and class, RLE on the label grid
DATA/train_images/   the images that train.csv names
DATA/data.json       optional, for other data: {"classes": [...], "label_grid": [H, W], "submit_grid": [H, W]}, and
                     "key_column": "ImageId_ClassId" if the first column of the tables has that name
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import DataError, RleError
from cloudrt.images.image import find_images
from cloudrt.labels import CLOUDS, Labels
from cloudrt.masks.rle import pack_mask, rle_to_submit_grid
from cloudrt.masks.table import read_rows, read_table


@dataclass(frozen=True)
class DataFolder:
    """A data set whose files exist; see `open_data`.

    Parameters
    ----------
    root
        The folder.
    labels
        Classes and grids.
    train_images
        Folder of the labelled images.
    train_csv
        Table of the labels.
    """

    root: Path
    labels: Labels
    train_images: Path
    train_csv: Path

    @property
    def image_folders(self) -> tuple[Path, Path]:
        """The folders of the labelled and of the test images; the second may not exist."""
        return self.train_images, self.root / "test_images"

    def read_train(self) -> dict[str, dict[str, str]]:
        """Return image name -> class -> RLE text, without classes that have no row.

        Images of `train_images` without any row are appended, without any class. They are left out if the table has
        rows with empty masks: such a table has rows for absent classes too, so an image without rows is unlabelled.

        Raises
        ------
        DataError
            See `read_table`.
        """
        images = self._read_rows()
        return images if writes_absences(images) else images | {name: {} for name in self.unlisted(images)}

    def _read_rows(self) -> dict[str, dict[str, str]]:
        images: dict[str, dict[str, str]] = {}
        for (name, label), text in read_table(self.train_csv, self.labels).items():
            images.setdefault(name, {})[label] = text
        return images

    def unlisted(self, images: Container[str]) -> list[str]:
        """Return the images of `train_images` that are not in `images`, sorted."""
        try:
            return [file.key for file in find_images(self.train_images) if file.key not in images]
        except DataError:  # the folder has no images
            return []

    def describe_unlisted(self) -> str:
        """Return how many images have no row, and what `read_train` does with them, as text; "" if there are none."""
        images = self._read_rows()
        count = len(self.unlisted(images))
        if not count:
            return ""
        what = (
            "are ignored: that table has rows for absent classes"
            if writes_absences(images)
            else "are used without any class"
        )
        return f"{count} images of {self.train_images} have no row in {self.train_csv.name} and {what}"

    def read_names(self) -> list[str]:
        """Return the images that train.csv names, each once; rows of unknown classes are ignored."""
        keys = (key.rpartition("_") for _, key, _ in read_rows(self.train_csv, self.labels))
        return list(dict.fromkeys(name for name, _, label in keys if name and label in self.labels.classes))

    def image_paths(self) -> Iterator[Path]:
        """Yield the paths of the labelled images."""
        yield from (self.train_images / name for name in self.read_names())

    def truth_bits(self, name: str, texts: dict[str, str]) -> NDArray[np.uint8]:
        """Return the masks of one image on the submission grid, packed by `pack_mask`.

        Parameters
        ----------
        name
            Name of the image, for error messages.
        texts
            Class -> RLE text on the label grid; a missing class is empty.

        Returns
        -------
        numpy.ndarray
            (C, ceil(W * H / 8)) uint8.

        Raises
        ------
        DataError
            A malformed RLE; the message names its row.
        """
        packed = []
        for label in self.labels.classes:
            try:
                packed.append(pack_mask(rle_to_submit_grid(texts.get(label, ""), self.labels)))
            except RleError as error:
                height, width = self.labels.label_grid
                raise DataError(f"{self.train_csv}, row {name}_{label}: {error} (grid {width}x{height})") from error
        return np.stack(packed)


def writes_absences(images: Mapping[str, Mapping[str, str]]) -> bool:
    """Return whether a table has rows for absent classes: image name -> class -> RLE text, some of them empty.

    True for a table without rows, because nothing is known about its images.
    """
    return not images or any(not text for texts in images.values() for text in texts.values())


def open_data(root: str | Path) -> DataFolder:
    """Open a data set in the competition's layout.

    Raises
    ------
    DataError
        The folder, train.csv or train_images is missing (the message says how to get them), or data.json is malformed.
    """
    root = Path(root)
    if root.is_file():
        raise DataError(f"{root} is a file: give the folder that contains train.csv and train_images")
    folder = DataFolder(root, read_labels(root), root / "train_images", root / "train.csv")
    for path, exists in (
        (folder.train_csv, folder.train_csv.is_file()),
        (folder.train_images, folder.train_images.is_dir()),
    ):
        if not exists:
            if root.is_dir() and (root.parent / "train.csv").is_file():
                raise DataError(f"{root} has no {path.name}: give the folder that contains train.csv, {root.parent}")
            raise DataError(
                f"{path} is missing: unpack the competition's data into {root} (kaggle competitions download -c "
                f"understanding_cloud_organization), or write a synthetic data set with: cloudrt synth {root}"
            )
    return folder


def read_labels(root: Path) -> Labels:
    """Return the classes and grids in `root`/data.json, or `CLOUDS` without one.

    Raises
    ------
    DataError
        data.json is malformed.
    """
    path = root / "data.json"
    if not path.is_file():
        return CLOUDS
    try:
        return Labels.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:  # ValueError: DataError, invalid JSON, invalid UTF-8
        raise DataError(
            f'{path}: {error}; write {{"classes": [...], "label_grid": [H, W], "submit_grid": [H, W]}}'
        ) from error
