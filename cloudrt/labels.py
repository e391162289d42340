"""The classes that are segmented and the pixel grids that their masks live on.

Everything that counts classes or pixels takes a `Labels`: the data set names it, training writes it into the
checkpoint, export into the artifact, inference reads it there. `CLOUDS`, the four cloud organisations of
"Understanding Clouds from Satellite Images", is the default.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

from cloudrt.errors import DataError

Grid = tuple[int, int]
"""Height and width of a mask, in pixels."""

CLASSES = ("Fish", "Flower", "Gravel", "Sugar")
LABEL_GRID: Grid = (1400, 2100)
SUBMIT_GRID: Grid = (350, 525)


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

    Raises
    ------
    DataError
        Names empty, repeated or with a comma; a grid that does not divide the other.
    """

    classes: tuple[str, ...] = CLASSES
    label_grid: Grid = LABEL_GRID
    submit_grid: Grid = SUBMIT_GRID

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

    @property
    def block(self) -> tuple[int, int]:
        """Height and width of the block of label pixels behind one submission pixel; (4, 4) for the clouds."""
        return self.label_grid[0] // self.submit_grid[0], self.label_grid[1] // self.submit_grid[1]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {name: list(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; missing keys take the clouds' values."""
        unknown = set(values) - {"classes", "label_grid", "submit_grid"}
        if unknown:
            raise DataError(f"unknown keys {sorted(unknown)}; expected classes, label_grid, submit_grid")
        if not all(isinstance(value, (list, tuple)) for value in values.values()):
            raise DataError(f"classes is a list of names, a grid a list of two integers: {values}")
        try:
            return cls(**{name: tuple(value) for name, value in values.items()})
        except TypeError as error:
            raise DataError(f"classes is a list of names, a grid a list of two integers: {values}") from error


CLOUDS = Labels()
