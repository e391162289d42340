"""The classes that are segmented and the pixel grids of their masks.

The data set defines its `Labels`; training writes them into the checkpoint, export into the artifact, and inference
reads them there. The default, `CLOUDS`, describes the competition "Understanding Clouds from Satellite Images".
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import Any, Self
from unicodedata import category

from cloudrt.arguments import shown
from cloudrt.errors import DataError

Grid = tuple[int, int]
"""Height and width of a mask, in pixels."""

CLASSES = ("Fish", "Flower", "Gravel", "Sugar")
LABEL_GRID: Grid = (1400, 2100)
SUBMIT_GRID: Grid = (350, 525)
KEY_COLUMN = "Image_Label"
FIELDS = ("classes", "label_grid", "submit_grid", "key_column")
"""Keys in data.json and in an artifact's metadata."""
MAX_NAME_BYTES = 100
"""Largest length of a class name in UTF-8; file systems allow 255 bytes."""
_CONTROLS = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories: control characters, surrogates, line and paragraph separators."""

# Based on the palette of Okabe and Ito (2008), distinguishable with every kind of colour vision: purple, green and
# vermilion are lighter, and violet and grey replace blue and black, because the ocean in the images is dark.
COLOURS = ("#e69f00", "#56b4e9", "#ee7abf", "#2bd4a0", "#f0e442", "#ff7a45", "#a58bff", "#c9c9c9")


def _check_class_name(name: Any) -> None:
    """Raise DataError for a class name that cannot be part of a row key, a CSV field or the name of a folder."""
    if not isinstance(name, str) or not name:
        raise DataError(f"a class name must be a non-empty string, found {shown(name)}")
    if any(character in ',_"' for character in name):
        raise DataError(f"class name {name!r}: use a name without commas, underscores or double quotes")
    if name in (".", "..") or any(character in "/\\" or category(character) in _CONTROLS for character in name):
        raise DataError(f"class name {name!r}: use a name without path separators or control characters")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise DataError(f"class name {name[:20]!r}...: use a name of at most {MAX_NAME_BYTES} bytes")


@dataclass(frozen=True)
class Labels:
    """Class names and grids of a data set.

    Parameters
    ----------
    classes
        Names in the order of the network's output channels. Folders of masks are named after them, so a name is a
        valid file name.
    label_grid
        Height and width of the masks in train.csv.
    submit_grid
        Height and width of the masks in a submission; `label_grid` must be a multiple of it.
    key_column
        Name of the first column of tables, which holds NAME_CLASS; some competitions use "ImageId_ClassId".

    Raises
    ------
    DataError
        A name that is empty, repeated, too long, or contains a comma, underscore, double quote, path separator or
        control character; a grid that is not two integers from 1 to 2**31 - 1; a `label_grid` that is not a multiple of
        `submit_grid`; a `key_column` that is not an identifier.
    """

    classes: tuple[str, ...] = CLASSES
    label_grid: Grid = LABEL_GRID
    submit_grid: Grid = SUBMIT_GRID
    key_column: str = KEY_COLUMN

    def __post_init__(self) -> None:
        if not isinstance(self.classes, tuple | list):
            raise DataError(f"classes must be a tuple of names, found {shown(self.classes)}")
        object.__setattr__(self, "classes", tuple(self.classes))
        for name in self.classes:
            _check_class_name(name)
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise DataError(f"classes must be distinct names, found {list(self.classes)}")
        for grid in (self.label_grid, self.submit_grid):
            two = isinstance(grid, tuple) and len(grid) == 2
            if not two or not all(type(side) is int and 1 <= side < 2**31 for side in grid):
                raise DataError(
                    f"a grid must be (height, width), two integers from 1 to 2**31 - 1, found {shown(grid)}"
                )
        if self.label_grid[0] % self.submit_grid[0] or self.label_grid[1] % self.submit_grid[1]:
            raise DataError(f"submit_grid {self.submit_grid} must divide label_grid {self.label_grid}")
        if not isinstance(self.key_column, str) or not self.key_column.isidentifier():
            raise DataError(f"key_column must be a name such as {KEY_COLUMN}, found {shown(self.key_column)}")

    @property
    def header(self) -> tuple[str, str]:
        """Columns of train.csv and of a submission."""
        return self.key_column, "EncodedPixels"

    @property
    def block(self) -> tuple[int, int]:
        """Height and width of the block of label pixels that one submission pixel covers; (4, 4) for the clouds."""
        return self.label_grid[0] // self.submit_grid[0], self.label_grid[1] // self.submit_grid[1]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; `key_column` is omitted if it has the default value."""
        grids = {"classes": self.classes, "label_grid": self.label_grid, "submit_grid": self.submit_grid}
        values: dict[str, Any] = {name: list(value) for name, value in grids.items()}
        return values if self.key_column == KEY_COLUMN else values | {"key_column": self.key_column}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return labels from the values that `to_dict` returned; missing keys have the default values.

        Raises
        ------
        DataError
            Not a dictionary, an unknown key or an invalid value.
        """
        if not isinstance(values, dict):
            raise DataError(f"expected an object, found {type(values).__name__}")
        unknown = set(values) - set(FIELDS)
        if unknown:
            raise DataError(f"unknown keys {sorted(map(str, unknown))}; expected {', '.join(FIELDS)}")
        lists = {name: value for name, value in values.items() if name != "key_column"}
        message = f"classes must be a list of names and each grid a list of two integers, found {shown(values)}"
        if not all(isinstance(value, (list, tuple)) for value in lists.values()):
            raise DataError(message)
        try:
            tuples = {name: tuple(value) for name, value in lists.items()}
            return cls(**{**values, **tuples})
        except TypeError as error:
            raise DataError(message) from error


CLOUDS = Labels()


def class_colours(count: int) -> list[str]:
    """Return `count` distinct colours as #rrggbb: `COLOURS` first, then hues a golden angle apart."""
    wheel = (colorsys.hls_to_rgb(index * 0.618034 % 1, 0.66, 0.7) for index in range(count - len(COLOURS)))
    more = ["#" + "".join(f"{round(255 * level):02x}" for level in rgb) for rgb in wheel]
    return [*COLOURS[:count], *more]
