"""The position of an image on the Earth, from its tags, a file beside it, the command line or its name.

    GeoTIFF tags -> world file -> bounds -> file name: the first that exists decides

A position is the outer corner of the first pixel and the size of a pixel, in a coordinate reference system. Longitudes
may run beyond 180 degrees where an image crosses the date line. A source that contradicts itself, or the image, raises
`ImageError`: the image fails with that reason.
"""

from __future__ import annotations

import datetime
import io
import math
import re
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import DataError, ImageError
from cloudrt.geo.bounds import Bounds, check_bounds
from cloudrt.labels import Grid

WGS84 = "EPSG:4326"
METRES_PER_DEGREE = 111_195.0
"""Length of a degree of a great circle on a sphere with the mean radius of the Earth."""

_WORLD_SUFFIXES = {".jpg": ".jgw", ".jpeg": ".jgw", ".png": ".pgw"}
WORLD_BYTES = 4096
"""Largest size of a world file; six numbers have about a hundred bytes."""
_NUMBER = r"(-?\d+(?:\.\d+)?)"
_NAME = re.compile(rf"(?P<date>\d{{8}})?_{_NUMBER}-{_NUMBER}_{_NUMBER}-{_NUMBER}\Z")
"""[YYYYMMDD]_WEST-EAST_SOUTH-NORTH at the end of a file name, such as 20200131_-61--40_10-24."""
_DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)(-?)(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])(?!\d)")
_SQUARE = 0.01
"""Bounds fit an image if the width and height of its pixels, in degrees, differ by at most this fraction."""

_RESOLVED = 2**-40
"""Smallest size of a pixel relative to its coordinates: float64 has 52 bits, and projections lose some of them."""


@dataclass(frozen=True)
class Position:
    """Where an image lies.

    Parameters
    ----------
    west, north
        Outer corner of the first pixel, in units of `crs`.
    pixel_width, pixel_height
        Size of a pixel, in units of `crs`; both positive.
    crs
        Coordinate reference system: "EPSG:4326", or what rasterio reads.
    degrees_per_unit
        Length of a unit of `crs` in degrees of a great circle; 1 for EPSG:4326.
    date
        The day of the image, from its name; None if the name has none.
    source
        Where the position was found: "GeoTIFF tags", "world file" and its suffix, "bounds" or "file name".
    """

    west: float
    north: float
    pixel_width: float
    pixel_height: float
    crs: str = WGS84
    degrees_per_unit: float = 1.0
    date: datetime.date | None = None
    source: str = ""

    def bounds(self, size: Grid) -> Bounds:
        """Return west, south, east and north of an image of `size` (height, width)."""
        height, width = size
        east, south = self.west + width * self.pixel_width, self.north - height * self.pixel_height
        return self.west, south, east, self.north

    def wraps(self, width: int) -> bool:
        """Return whether `width` pixels go around the Earth, so that the last column adjoins the first."""
        return self.crs == WGS84 and abs(width * self.pixel_width - 360) < 0.5 * self.pixel_width

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON, without `degrees_per_unit`."""
        return {
            "west": self.west,
            "north": self.north,
            "pixel": [self.pixel_width, self.pixel_height],
            "crs": self.crs,
            "date": self.date.isoformat() if self.date else None,
            "source": self.source,
        }

    @classmethod
    def from_dict(cls, values: Any) -> Position:
        """Return the position that `to_dict` described, with a `degrees_per_unit` of 1; DataError if malformed."""
        try:
            date = values["date"]
            return cls(
                west=float(values["west"]),
                north=float(values["north"]),
                pixel_width=float(values["pixel"][0]),
                pixel_height=float(values["pixel"][1]),
                crs=str(values["crs"]),
                date=datetime.date.fromisoformat(date) if date else None,
                source=str(values.get("source", "")),
            )
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"not a position: {values}") from error


def read_position(path: Path, size: Grid, bounds: Bounds | None = None, data: bytes | None = None) -> Position | None:
    """Return the position of an image; None if nothing states it.

    Parameters
    ----------
    path
        The image file.
    size
        Its height and width in pixels.
    bounds
        West, south, east and north, in degrees, for images without tags or a world file.
    data
        The bytes of an image that is not a file: `path` is only its name, and there is no world file.

    Raises
    ------
    ImageError
        GeoTIFF tags or a world file that cannot be read, a rotated image, a position that contradicts itself or the
        size, or coordinates outside the Earth.
    """
    date = read_date(path.name)
    found = _from_tags(path, date, data)
    if found is None and data is None:
        found = _from_world_file(path, date)
    if found is None and bounds is not None:
        found = _from_bounds(bounds, size, date, "bounds")
    if found is None:
        found = _from_name(path, size)
    if found is not None:
        _check_on_earth(found, size)
    return found


def world_files(path: Path) -> list[Path]:
    """Return the paths where the world file of an image may be, in the order in which they are tried."""
    suffixes = _WORLD_SUFFIXES.get(path.suffix.lower()), ".wld"
    return [path.with_suffix(suffix) for suffix in suffixes if suffix]


def check_degrees(position: Position, size: Grid) -> None:
    """Raise ImageError if not all of an image of `size` has longitudes and latitudes.

    Some projections cover only a part of the plane: the corners of a geostationary view, for example, lie outside the
    Earth. Only the corners of the pixels along the edges of the image are tested.
    """
    if position.crs == WGS84:
        return
    from pyproj.exceptions import ProjError

    west, south, east, north = position.bounds(size)
    x, y = np.linspace(west, east, size[1] + 1), np.linspace(north, south, size[0] + 1)
    sides = [np.column_stack(np.broadcast_arrays(*side)) for side in ((x, south), (x, north), (west, y), (east, y))]
    try:
        found = to_degrees(np.concatenate(sides), position.crs)
    except ProjError as error:
        raise ImageError(f"has a reference system without longitudes and latitudes ({position.source})") from error
    slack = position.pixel_height * position.degrees_per_unit  # the mask may end within a pixel that crosses a pole
    # pyproj returns infinity for points outside the projection, but out-of-range degrees of another datum as they are.
    if not (np.abs(found) <= (540 + slack, 90 + slack)).all():
        raise ImageError(f"reaches beyond the part of the Earth that its projection covers ({position.source})")


def to_degrees(points: NDArray[np.float64], crs: str) -> NDArray[np.float64]:
    """Return the longitudes and latitudes of points, (n, 2); infinite where the projection has none."""
    return np.column_stack(_transformer(crs).transform(points[:, 0], points[:, 1]))


@lru_cache(16)
def _transformer(crs: str) -> Any:
    from pyproj import Transformer

    return Transformer.from_crs(crs, WGS84, always_xy=True)


def read_date(name: str) -> datetime.date | None:
    """Return the first date in a file name, YYYYMMDD or YYYY-MM-DD; None if there is none."""
    for found in _DATE.finditer(name):
        try:
            return datetime.date(int(found[1]), int(found[3]), int(found[4]))
        except ValueError:  # 30 February
            continue
    return None


def _from_tags(path: Path, date: datetime.date | None, data: bytes | None) -> Position | None:
    if path.suffix.lower() not in (".tif", ".tiff") if data is None else data[:2] not in (b"II", b"MM"):
        return None
    import rasterio
    from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            # Bytes are opened as GeoTIFF only: GDAL's other formats can refer to files on this machine.
            with rasterio.open(path) if data is None else rasterio.open(io.BytesIO(data), driver="GTiff") as file:
                transform, crs = file.transform, file.crs
                if transform.is_identity:
                    return None
                unit = 1.0
                if crs and crs.is_geographic:
                    unit = round(math.degrees(crs.units_factor[1]), 9)  # 0.9 for grads
                elif crs:
                    unit = crs.linear_units_factor[1] / METRES_PER_DEGREE
                name = WGS84 if crs is None or crs.to_string() in (WGS84, "OGC:CRS84") else crs.to_string()
    except (RasterioError, CRSError) as error:  # CRSError: no length of a unit, as in a local system
        raise ImageError(f"has no readable GeoTIFF tags: {error}") from error
    return _from_affine(tuple(transform)[:6], "GeoTIFF tags", name, unit, date)


def _from_world_file(path: Path, date: datetime.date | None) -> Position | None:
    """Read six lines: A, D, B and E of the affine transform, then the centre of the first pixel."""
    file = next((one for one in world_files(path) if one.is_file()), None)
    if file is None:
        return None
    try:
        with file.open("rb") as opened:
            text = opened.read(WORLD_BYTES + 1)
        if len(text) > WORLD_BYTES:
            raise ValueError(f"more than {WORLD_BYTES} bytes")
        a, d, b, e, x, y = (float(word) for word in text.decode("ascii").split())
    except (OSError, ValueError) as error:
        raise ImageError(f"has a world file, {file.name}, that is not six numbers") from error
    corner = x - a / 2 - b / 2, y - d / 2 - e / 2
    return _from_affine((a, b, corner[0], d, e, corner[1]), f"world file {file.suffix}", WGS84, 1.0, date)


def _from_affine(affine: tuple[float, ...], source: str, crs: str, unit: float, date: datetime.date | None) -> Position:
    a, b, west, d, e, north = affine
    if not all(map(math.isfinite, affine)):
        raise ImageError(f"has a position that is not finite, in its {source}")
    if abs(b) > 1e-6 * abs(a) or abs(d) > 1e-6 * abs(e):
        raise ImageError(f"is rotated on the map, by its {source}: only images with north at the top can be placed")
    if a <= 0 or e >= 0:
        axis = "north below south" if e >= 0 else "east left of west"
        raise ImageError(f"has a position that contradicts itself, in its {source}: {axis}")
    if min(a / (1 + abs(west)), -e / (1 + abs(north))) < _RESOLVED:
        raise ImageError(f"has a position that contradicts itself, in its {source}: its pixels are too small to place")
    return Position(west, north, a, -e, crs, unit, date, source)


def _from_bounds(bounds: Bounds, size: Grid, date: datetime.date | None, source: str) -> Position:
    try:
        west, south, east, north = check_bounds(bounds, source)
    except DataError as error:
        raise ImageError(f"has a position that contradicts itself: {error}") from error
    height, width = size
    # Across the date line, west is greater than east: 170 and -170, for example.
    across, down = east - west if east > west else east - west + 360, north - south
    if abs(across * height / (down * width) - 1) > _SQUARE:
        raise ImageError(
            f"has {width}x{height} pixels, which do not fit {across:g} degrees of longitude and {down:g} of latitude "
            f"({source})"
        )
    return Position(west, north, across / width, down / height, date=date, source=source)


def _from_name(path: Path, size: Grid) -> Position | None:
    found = _NAME.search(path.stem)
    if found is None:
        return None
    date = read_date(found["date"]) if found["date"] else None
    if found["date"] and date is None:
        raise ImageError(f"has {found['date']} in its name, which is not a date")
    west, east, south, north = (float(found[group]) for group in range(2, 6))
    return _from_bounds((west, south, east, north), size, date or read_date(path.name), "file name")


def _check_on_earth(position: Position, size: Grid) -> None:
    if position.crs != WGS84:
        return
    west, south, east, north = position.bounds(size)
    slack = position.pixel_width
    if south < -90 - slack or north > 90 + slack or west < -180 - slack or east > 540 + slack or west > 360:
        raise ImageError(
            f"lies outside the Earth: longitudes {west:g} to {east:g}, latitudes {south:g} to {north:g} "
            f"({position.source})"
        )
    if east - west > 360 + slack:
        raise ImageError(f"covers {east - west:g} degrees of longitude, more than 360 ({position.source})")
