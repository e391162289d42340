"""Bounds of an image on the Earth: west, south, east and north in degrees, parsed and checked.

West may be greater than east, or longitudes may exceed 180 degrees, where an image crosses the date line.
"""

from __future__ import annotations

import math
from numbers import Real

from cloudrt.arguments import check_type
from cloudrt.errors import DataError

Bounds = tuple[float, float, float, float]
"""West, south, east, north."""


def parse_bounds(text: str, name: str = "--bounds") -> Bounds:
    """Return the numbers of "LON1,LAT1,LON2,LAT2": west, south, east and north in degrees; errors contain `name`.

    Raises
    ------
    DataError
        Not four numbers; south is not below north; west equals east; outside the Earth.
    """
    try:
        west, south, east, north = (float(part) for part in text.split(","))
    except ValueError:
        raise DataError(f"{name} {text}: give LON1,LAT1,LON2,LAT2 in degrees, such as -61,10,-40,24") from None
    return check_bounds((west, south, east, north), f"{name} {text}")


def check_bounds(bounds: Bounds, where: str) -> Bounds:
    """Return the bounds if they lie on the Earth, with south below north; otherwise raise DataError."""
    if not isinstance(bounds, tuple | list) or len(bounds) != 4:
        raise DataError(f"{where}: bounds must be four numbers: west, south, east, north")
    for one in bounds:
        check_type(f"{where}: each of the bounds", one, Real, "a number")
    west, south, east, north = bounds
    if (
        not all(map(math.isfinite, bounds))
        or max(abs(south), abs(north)) > 90
        or not all(-180 <= longitude <= 360 for longitude in (west, east))
    ):
        raise DataError(f"{where}: outside the Earth, whose longitudes are -180 to 360 and latitudes -90 to 90")
    if south >= north:
        raise DataError(f"{where}: north ({north:g}) is not above south ({south:g})")
    if west == east:
        raise DataError(f"{where}: west and east are the same")
    return bounds
