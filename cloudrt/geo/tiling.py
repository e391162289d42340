"""How panoramas are cut into tiles: the overlap, and where the tiles along an axis begin.

Tiles begin at multiples of 8 pixels, so that they begin at whole pixels at every scale of libjpeg-turbo. They also
begin at multiples of a block: the pixels, at the resolution of training, that one pixel of the grid covers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cloudrt.errors import DataError
from cloudrt.geo.bounds import Bounds
from cloudrt.model.artifact import Artifact

OVERLAP = 0.125
"""Default overlap of neighbouring tiles, as a fraction of a tile; measured in docs/how-to/maps.md."""
SCALES = 8
"""libjpeg-turbo decodes a JPEG at 1/8, 2/8, ... of its size."""


@dataclass(frozen=True)
class Tiling:
    """How images are cut into tiles.

    Parameters
    ----------
    overlap
        Overlap of neighbouring tiles, as a fraction of a tile.
    bounds
        West, south, east and north, in degrees, of the images without tags or a world file.
    needs_position
        Whether an image without a position fails.

    Raises
    ------
    DataError
        An overlap out of range.
    """

    overlap: float = OVERLAP
    bounds: Bounds | None = None
    needs_position: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.overlap, int | float) or not 0 <= self.overlap <= 0.9:
            raise DataError(f"overlap must be from 0 to 0.9 of a tile, found {self.overlap!r}")


def check_tiles(artifact: Artifact, tiling: Tiling) -> None:
    """Check that an artifact's field of view can be cut into tiles.

    Raises
    ------
    DataError
        The field of view is not a multiple of the submission grid; tiles that are too small for the overlap.
    """
    for view, grid in zip(artifact.field_of_view, artifact.labels.submit_grid, strict=True):
        if view % grid:
            height, width = artifact.field_of_view
            raise DataError(
                f"the artifact's field of view, {width}x{height} pixels, is not a multiple of its submission grid: its "
                "images cannot be cut into tiles"
            )
        if view * (1 - tiling.overlap) < math.lcm(SCALES, view // grid):
            raise DataError(f"overlap {tiling.overlap:g} is too large for a field of view of {view} pixels")


def offsets(length: int, view: int, align: int, overlap: float, wraps: bool = False) -> list[int]:
    """Return where the tiles along one axis begin: at even distances, at multiples of `align` pixels.

    Parameters
    ----------
    length
        Pixels of the panorama.
    view
        Pixels of a tile. The last of several tiles reaches less than `align` pixels beyond the panorama; a single tile
        may reach further.
    align
        Every tile begins at a multiple of this.
    overlap
        Smallest overlap of neighbours, as a fraction of a tile; alignment reduces it by less than `align` pixels.
    wraps
        Whether the panorama goes around the Earth: the last tiles overlap the first ones.
    """
    step = min(view * (1 - overlap), view // align * align)  # no gaps
    if wraps:
        count = max(2, math.ceil(length / step))
        while length - length * (count - 1) // count // align * align > view:  # a gap after the last tile
            count += 1
        return sorted({length * one // count // align * align for one in range(count)})
    if length <= view:
        return [0]
    last = -(-(length - view) // align) * align
    count = math.ceil(last / step) + 1
    return sorted({last * one // (count - 1) // align * align for one in range(count)})
