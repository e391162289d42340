"""The grid of a panorama's masks and its position: what the outputs need beside the RLE texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from cloudrt.errors import DataError
from cloudrt.geo.positions import Position
from cloudrt.labels import Grid, Labels


@dataclass(frozen=True)
class MaskGrid:
    """The grid of the masks of one panorama.

    Parameters
    ----------
    grid
        Height and width of the masks.
    position
        Position of the grid; its pixel size is that of the grid, not of the image. None if it is unknown.
    wraps
        Whether the last column adjoins the first.
    no_data
        RLE text, on the grid, of the pixels without data.
    means
        For each class, the mean probability of each component, in the order of `cloudrt.geo.components.label`.
    """

    grid: Grid
    position: Position | None = None
    wraps: bool = False
    no_data: str = ""
    means: tuple[tuple[float, ...], ...] = ()

    def labels(self, labels: Labels) -> Labels:
        """Return the same classes on this grid."""
        return Labels(labels.classes, self.grid, self.grid, labels.key_column)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "grid": self.grid,
            "position": self.position.to_dict() if self.position else None,
            "wraps": self.wraps,
            "no_data": self.no_data,
            "means": self.means,
        }

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Return the grid that `to_dict` described; DataError if it is malformed."""
        try:
            height, width = values["grid"]
            return cls(
                grid=(int(height), int(width)),
                position=Position.from_dict(values["position"]) if values["position"] else None,
                wraps=bool(values["wraps"]),
                no_data=str(values["no_data"]),
                means=tuple(tuple(float(mean) for mean in one) for one in values["means"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError("malformed grid of masks") from error
