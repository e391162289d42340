"""Masks as polygons with longitude and latitude: GeoJSON (RFC 7946) and GeoParquet 1.0.

    RLE text -> components -> outlines of the pixels -> simplified -> WGS84, cut at the date line -> a feature each

Masks without a position become polygons in pixels of their grid, for the server.

A component whose parts touch only at corners, or that crosses the date line, is a MultiPolygon. Its area is that of
its pixels on the ellipsoid, before the outline is simplified.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloudrt.geo.components import label
from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.geo.positions import WGS84, Position, to_degrees
from cloudrt.masks.rle import rle_decode
from cloudrt.system.files import replacing

_SEMI_MAJOR_KM, _FLATTENING = 6378.137, 1 / 298.257223563
_ROW_GROUP = 20_000
"""Polygons per row group, which are kept in memory until they are written."""


@dataclass(frozen=True)
class Feature:
    """One component of a mask.

    Parameters
    ----------
    geometry
        A valid shapely Polygon or MultiPolygon in degrees (longitude, latitude), or in pixels.
    pattern, image, date
        Class, key of the image, and its day as YYYY-MM-DD or None.
    area_km2
        Area on the WGS84 ellipsoid; None without a position.
    probability
        Mean probability of its pixels.
    area_pixels
        Area in pixels of the grid; only without a position.
    """

    geometry: Any
    pattern: str
    image: str
    date: str | None
    area_km2: float | None
    probability: float
    area_pixels: int | None = None

    def properties(self) -> dict[str, Any]:
        """Return everything but the geometry."""
        area = {"area_pixels": self.area_pixels} if self.area_km2 is None else {"area_km2": round(self.area_km2, 3)}
        return {
            "pattern": self.pattern,
            "image": self.image,
            "date": self.date,
            **area,
            "probability": self.probability,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return a feature of GeoJSON."""
        from shapely.geometry import mapping

        return {"type": "Feature", "geometry": mapping(self.geometry), "properties": self.properties()}


def features(key: str, rle: Mapping[str, str], place: MaskGrid, simplify: float) -> Iterator[Feature]:
    """Yield a feature for each component of each class.

    Parameters
    ----------
    key
        The image.
    rle
        Class -> RLE text on the grid of `place`.
    place
        Grid and position; without a position, nothing is yielded.
    simplify
        Outlines may deviate by this many pixels of the grid.
    """
    position = place.position
    if position is None:
        return
    date = position.date.isoformat() if position.date else None
    for index, (pattern, text) in enumerate(rle.items()):
        if not text:
            continue
        numbers, count = label(rle_decode(text, place.grid), place.wraps)
        areas = _pixel_areas(numbers, count, position) if position.crs == WGS84 else None
        for number, outline in enumerate(_outlines(numbers, count, _transform(position))):
            geometry = _to_degrees(outline, position)
            area = _geodesic_area(geometry) if areas is None else float(areas[number])
            simple = _simplify(outline, simplify * min(position.pixel_width, position.pixel_height))
            yield Feature(
                geometry=_cut_at_date_line(geometry if simple is outline else _to_degrees(simple, position)),
                pattern=pattern,
                image=key,
                date=date,
                area_km2=area,
                probability=place.means[index][number],
            )


def pixel_features(key: str, rle: Mapping[str, str], place: MaskGrid, simplify: float) -> Iterator[Feature]:
    """Yield a feature for each component of each class, in pixels of the grid.

    x is 0 at the left side of the first column and increases to the right, y is 0 at the top of the first row and
    increases downward. The parameters are those of `features`; the position of `place` is not used.
    """
    import shapely
    from rasterio import Affine
    from shapely.geometry.polygon import orient

    for index, (pattern, text) in enumerate(rle.items()):
        if not text:
            continue
        numbers, count = label(rle_decode(text, place.grid))
        areas = np.bincount(numbers.ravel(), minlength=count + 1)
        for number, outline in enumerate(_outlines(numbers, count, Affine.identity())):
            parts = [orient(part) for part in shapely.get_parts(_simplify(outline, simplify))]
            yield Feature(
                geometry=parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts),
                pattern=pattern,
                image=key,
                date=None,
                area_km2=None,
                probability=place.means[index][number],
                area_pixels=int(areas[number + 1]),
            )


def write_geojson(path: Path, found: Iterable[Feature]) -> None:
    """Write a FeatureCollection, one feature per line."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for number, one in enumerate(found):
            file.write((",\n" if number else "\n") + json.dumps(one.to_dict()))
        file.write("\n]}\n")


def write_geoparquet(path: Path, found: Iterable[Feature]) -> None:
    """Write GeoParquet 1.0: a row for each feature, its geometry as WKB in longitude and latitude (OGC:CRS84)."""
    import pyarrow
    import pyarrow.parquet

    geometry = {"encoding": "WKB", "geometry_types": ["Polygon", "MultiPolygon"]}
    geo = {"version": "1.0.0", "primary_column": "geometry", "columns": {"geometry": geometry}}
    columns = [
        ("pattern", pyarrow.string()),
        ("image", pyarrow.string()),
        ("date", pyarrow.string()),
        ("area_km2", pyarrow.float64()),
        ("probability", pyarrow.float64()),
        ("geometry", pyarrow.binary()),
    ]
    schema = pyarrow.schema(columns, metadata={"geo": json.dumps(geo)})
    with (
        replacing(path) as partial,
        partial.open("wb") as file,  # pyarrow refuses names that are not UTF-8
        pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        rows: list[dict[str, Any]] = []
        for one in found:
            rows.append(one.properties() | {"geometry": one.geometry.wkb})
            if len(rows) >= _ROW_GROUP:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                rows = []
        writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def cell_areas(edges: NDArray[np.float64], width: float) -> NDArray[np.float64]:
    """Return the areas in km² of cells between parallels on the WGS84 ellipsoid.

    Parameters
    ----------
    edges
        (n + 1,) latitudes in degrees.
    width
        Degrees of longitude.

    Notes
    -----
    The area between the equator and a latitude: Snyder, "Map Projections: A Working Manual" (1987), equation 3-12.
    """
    squared = _FLATTENING * (2 - _FLATTENING)
    eccentricity = math.sqrt(squared)
    sine = np.sin(np.radians(edges))
    q = (1 - squared) * (sine / (1 - squared * sine**2) + np.arctanh(eccentricity * sine) / eccentricity)
    return np.asarray(np.abs(np.diff(q)) * _SEMI_MAJOR_KM**2 / 2 * math.radians(width))


def _pixel_areas(numbers: NDArray[np.int32], count: int, position: Position) -> NDArray[np.float64]:
    """Return the area of each component, (count,), in km²."""
    edges = position.north - position.pixel_height * np.arange(len(numbers) + 1)
    rows = cell_areas(np.clip(edges, -90, 90), position.pixel_width)
    where, _ = np.nonzero(numbers)
    found = np.bincount(numbers[numbers > 0], weights=rows[where], minlength=count + 1)
    return np.asarray(found[1:])


def _transform(position: Position) -> Any:
    from rasterio.transform import from_origin

    return from_origin(position.west, position.north, position.pixel_width, position.pixel_height)


def _outlines(numbers: NDArray[np.int32], count: int, transform: Any) -> Iterator[Any]:
    """Yield the outline of each component, in order, along the edges of its pixels; `transform` maps pixels."""
    import shapely
    from rasterio.features import shapes
    from shapely.geometry import shape

    parts: dict[int, list[Any]] = {}
    # Diagonal neighbours become parts: a ring that touches itself is not valid.
    for outline, number in shapes(numbers, mask=numbers > 0, connectivity=4, transform=transform):
        parts.setdefault(int(number), []).append(shape(outline))
    for number in range(1, count + 1):
        found = parts[number]
        yield found[0] if len(found) == 1 else shapely.MultiPolygon(found)


def _simplify(outline: Any, tolerance: float) -> Any:
    """Return the outline with fewer vertices, or the outline itself if the result would not be valid."""
    if tolerance <= 0:
        return outline
    simple = outline.simplify(tolerance, preserve_topology=True)
    return simple if simple.is_valid and not simple.is_empty else outline


def _to_degrees(outline: Any, position: Position) -> Any:
    """Return the outline in degrees; its longitudes are within 180 of its centre, and may lie beyond -180 or 180."""
    if position.crs == WGS84:
        return outline
    import shapely

    west, south, east, north = outline.bounds
    ((reference, _),) = to_degrees(np.array([[(west + east) / 2, (south + north) / 2]]), position.crs)

    def convert(points: NDArray[np.float64]) -> NDArray[np.float64]:
        found = to_degrees(points, position.crs)
        found[:, 0] -= 360 * np.rint((found[:, 0] - reference) / 360)
        found[:, 1] = np.clip(found[:, 1], -90, 90)  # the last pixel may cross a pole, where no area is defined
        return found

    return shapely.transform(outline, convert)


def _cut_at_date_line(geometry: Any) -> Any:
    """Return the geometry within -180 to 180 degrees, cut in two where it crosses 180 (RFC 7946, 3.1.9).

    Exterior rings are counter-clockwise and holes clockwise (RFC 7946, 3.1.6), as those of `_outlines`.
    """
    west, south, east, north = geometry.bounds
    if west >= -180 and east <= 180:
        return geometry
    import shapely
    from shapely.affinity import translate
    from shapely.geometry.polygon import orient

    parts = []
    for turn in (-360, 0, 360):
        inside = geometry.intersection(shapely.box(turn - 180, south - 1, turn + 180, north + 1))
        parts += [orient(part) for part in shapely.get_parts(translate(inside, -turn)) if part.geom_type == "Polygon"]
    return parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)


def _geodesic_area(geometry: Any) -> float:
    from pyproj import Geod

    area, _ = Geod(ellps="WGS84").geometry_area_perimeter(geometry)
    return abs(float(area)) / 1e6
