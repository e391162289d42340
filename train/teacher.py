"""The teacher of a distillation: stored probabilities of the training images, such as oof.npz of --folds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import DataError
from cloudrt.labels import Grid, Labels
from cloudrt.search.probabilities import Probabilities


class Teacher:
    """Reads the probabilities of one image at a time; can be used in several processes.

    Parameters
    ----------
    path
        Written by `cloudrt-train --folds` (oof.npz) or with --save-probabilities.
    names
        Names of the training images.
    labels
        Classes and grids of the data set.
    size
        Height and width of the maps that `read` returns.
    presence
        Whether the network has a classification head, for which the file must contain `presence`.

    Raises
    ------
    DataError
        The file is missing or damaged, has other classes or grids, or lacks an image.
    """

    def __init__(self, path: Path, names: Sequence[str], labels: Labels, size: Grid, presence: bool) -> None:
        self.path, self.size = path, size
        with Probabilities(path) as kept:
            if kept.labels != labels:
                raise DataError(f"{path} has other classes or grids than the data set")
            self.names = frozenset(kept.keys)
            """Names of the images in the file."""
            missing = set(names) - self.names
            if missing:
                raise DataError(
                    f"{path} lacks {len(missing)} of {len(names)} training images, such as {min(missing)}: make it "
                    "with cloudrt-train --folds on the same data set, with the same --held-out"
                )
            without = next((name for name in names if presence and not kept.has_presence(name)), None)
            if without is not None:
                raise DataError(
                    f"{path} has no presence output of {without}, which --presence head needs: train the teachers with "
                    "--presence head"
                )
        self._open: tuple[int, Probabilities] | None = None

    def read(self, name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return the levels of an image, (H, W, C) uint8 0..255, and its presence, (C,) uint8; zeros without a head."""
        if self._open is None or self._open[0] != os.getpid():  # a file position is shared with a forked process
            self._open = os.getpid(), Probabilities(self.path)
        levels, presence = self._open[1].read(name)
        height, width = self.size
        planes = [cv2.transpose(cv2.resize(one, (height, width), interpolation=cv2.INTER_AREA)) for one in levels]
        present = np.zeros(len(planes), np.uint8) if presence is None else presence
        return np.stack(planes, axis=2).astype(np.uint8), present
