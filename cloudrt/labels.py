"""The classes that are segmented and the pixel grids that their masks live on.

Everything that counts classes or pixels takes a `Labels`: the data set names it, training writes it into the
checkpoint, export into the artifact, inference reads it there. `CLOUDS`, the four cloud organisations of
"Understanding Clouds from Satellite Images", is the default.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import Any, Self

from cloudrt.errors import DataError

Grid = tuple[int, int]
"""Height and width of a mask, in pixels."""

CLASSES = ("Fish", "Flower", "Gravel", "Sugar")
LABEL_GRID: Grid = (1400, 2100)
SUBMIT_GRID: Grid = (350, 525)
KEY_COLUMN = "Image_Label"
FIELDS = ("classes", "label_grid", "submit_grid", "key_column")
"""Of data.json and of an artifact's metadata."""


# Okabe and Ito's colours (2008), told apart by all forms of colour vision; green and vermilion a little lighter, since
# the ocean beneath is dark.
COLOURS = ("#e69f00", "#56b4e9", "#ee7abf", "#2bd4a0", "#f0e442", "#ff7a45", "#a58bff", "#c9c9c9")


@dataclass(frozen=True)
class Labels:
    """Class names and grids of one data set.

    Parameters
    ----------
    classes
        Names in the order of the network's output channels.
    label_grid
        Height and width of the masks in train.csv.
    submit_grid
        Height and width of the masks in a submission; divides `label_grid`.
    key_column
        What the tables call their first column, of NAME_CLASS: "ImageId_ClassId" in other competitions.

    Raises
    ------
    DataError
        Names empty, repeated or with a comma; a grid that does not divide the other.
    """

    classes: tuple[str, ...] = CLASSES
    label_grid: Grid = LABEL_GRID
    submit_grid: Grid = SUBMIT_GRID
    key_column: str = KEY_COLUMN

    def __post_init__(self) -> None:
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise DataError(f"classes must be distinct names, found {list(self.classes)}")
        for name in self.classes:
            if not name or any(character in name for character in ',_\n\r"'):
                raise DataError(f"class name {name!r}: use a name without commas, underscores, quotes or line breaks")
        for grid in (self.label_grid, self.submit_grid):
            if len(grid) != 2 or not all(type(side) is int and side >= 1 for side in grid):
                raise DataError(f"a grid is (height, width) in whole pixels, both at least 1, found {grid}")
        if self.label_grid[0] % self.submit_grid[0] or self.label_grid[1] % self.submit_grid[1]:
            raise DataError(f"submit_grid {self.submit_grid} must divide label_grid {self.label_grid}")
        if not isinstance(self.key_column, str) or not self.key_column.isidentifier():
            raise DataError(f"key_column is a name such as {KEY_COLUMN}, found {self.key_column!r}")

    @property
    def header(self) -> tuple[str, str]:
        """The columns of train.csv and of a submission."""
        return self.key_column, "EncodedPixels"

    @property
    def block(self) -> tuple[int, int]:
        """Height and width of the block of label pixels behind one submission pixel; (4, 4) for the clouds."""
        return self.label_grid[0] // self.submit_grid[0], self.label_grid[1] // self.submit_grid[1]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the column's name only where it is not the clouds'."""
        grids = {"classes": self.classes, "label_grid": self.label_grid, "submit_grid": self.submit_grid}
        values: dict[str, Any] = {name: list(value) for name, value in grids.items()}
        return values if self.key_column == KEY_COLUMN else values | {"key_column": self.key_column}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; missing keys take the clouds' values."""
        unknown = set(values) - set(FIELDS)
        if unknown:
            raise DataError(f"unknown keys {sorted(unknown)}; expected {', '.join(FIELDS)}")
        lists = {name: value for name, value in values.items() if name != "key_column"}
        if not all(isinstance(value, (list, tuple)) for value in lists.values()):
            raise DataError(f"classes is a list of names, a grid a list of two integers: {values}")
        try:
            tuples = {name: tuple(value) for name, value in lists.items()}
            return cls(**{**values, **tuples})
        except TypeError as error:
            raise DataError(f"classes is a list of names, a grid a list of two integers: {values}") from error


CLOUDS = Labels()


def class_colours(count: int) -> list[str]:
    """Return a colour for each class, #rrggbb: those for all forms of colour vision first, then hues of the wheel."""
    wheel = (colorsys.hls_to_rgb(index * 0.618034 % 1, 0.66, 0.7) for index in range(count - len(COLOURS)))
    more = ["#" + "".join(f"{round(255 * level):02x}" for level in rgb) for rgb in wheel]
    return [*COLOURS[:count], *more]
