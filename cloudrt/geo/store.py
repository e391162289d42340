"""A zarr store of daily masks, `mask(time, lat, lon, pattern)` with CF metadata, to which days are appended.

The store has zarr format 2 with consolidated metadata, `.zmetadata`, which xarray opens. An append writes the chunks of
the new day first and replaces `.zmetadata` last, in one step: until then the store holds the days that it held before,
even if the process is killed or the disk fills up. The next append removes what was left behind. A day that is replaced
is not protected in this way: its chunks are overwritten one by one, and after a kill it may hold chunks of both masks
until the image is written again. The attribute `crc32` of `mask` has a checksum for each day, so that `.zmetadata`
changes with the masks; `crc32_axes` has one for each axis, see `cloudrt.geo.store_checks`.
"""

from __future__ import annotations

import datetime
import json
import logging
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import DataError, ImageError
from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.geo.positions import WGS84
from cloudrt.geo.store_checks import METADATA, axis_checksums, open_store, stored_days
from cloudrt.masks.rle import rle_decode
from cloudrt.system.files import locked, naming, partial_path, remove_leftovers, remove_tree, replacing
from cloudrt.system.versions import VERSION

logger = logging.getLogger(__name__)

NO_DATA = -1
_EPOCH = datetime.date(1970, 1, 1)
_DAYS_PER_CHUNK = 4096
_SIDE = 4096
"""Largest number of rows and columns of a chunk of the mask; time is always 1."""


class StoreDays:
    """Refuses panoramas that a store cannot hold; a check of `cloudrt.inference.panorama_checks`.

    Parameters
    ----------
    path
        The store to append to; None, or a path that does not exist, for a new one.
    classes
        Names of the patterns; None accepts any.

    Raises
    ------
    DataError
        `path` is not a store of cloudrt, or has other classes.
    """

    def __init__(self, path: Path | None, classes: tuple[str, ...] | None = None) -> None:
        self._grid: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
        self._name, self._days = "the first image", dict[int, str]()
        if path is not None and path.exists():
            group = open_store(path, classes)
            self._grid = group["lat"][:], group["lon"][:]
            self._name, self._days = str(path), stored_days(group)

    def check(self, key: str, place: MaskGrid) -> None:
        """Remember a panorama; raise ImageError if it is not in degrees, or its date or grid does not fit."""
        position = place.position
        if position is None or position.crs != WGS84:
            raise ImageError("is not in longitude and latitude (EPSG:4326), which a store of days needs")
        if position.date is None:
            raise ImageError("has no date in its name, which a store of days needs")
        day = _number(position.date)
        if self._days.get(day, key) != key:
            raise ImageError(f"shows {position.date}, which is taken by {self._days[day]}")
        grid = coordinates(place)
        if self._grid is None:
            self._grid = grid
        if not _same(grid, self._grid):
            raise ImageError(f"lies on another grid than {self._name}: {_describe(grid)}, not {_describe(self._grid)}")
        self._days[day] = key


class Store:
    """Appends days to a store, which is created with the first one; a context manager.

    Parameters
    ----------
    path
        The folder.
    classes
        Names of the patterns.

    Raises
    ------
    DataError
        `path` is not a store of cloudrt, has other classes, or is being written by another process.
    """

    def __init__(self, path: Path, classes: tuple[str, ...]) -> None:
        self.path, self.classes = path, classes
        self._group: Any = None
        self._days: dict[int, str] = {}
        self._checksums: list[int | None] = []
        self._replaced = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            if self.path.exists():
                self._open_existing()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        if self._replaced:
            logger.info("%s: replaced %d days that an earlier run wrote", self.path, self._replaced)

    def append(self, key: str, texts: tuple[str, ...], place: MaskGrid) -> None:
        """Append the masks of one day, or replace them if the same image wrote them.

        Raises
        ------
        DataError
            The day was written by another image, or lies on another grid.
        OSError
            The disk is full; the store stays as it was, except that a day that was being replaced may be damaged.
        """
        if self._group is None:
            self._create(place)
        position = place.position
        assert position is not None and position.date is not None  # see `StoreDays`
        grid = self._group["lat"][:], self._group["lon"][:]
        day = _number(position.date)
        if not _same(coordinates(place), grid) or self._days.get(day, key) != key:
            raise DataError(f"{self.path} cannot hold {key}: another grid, or {position.date} is taken")
        masks = np.stack([rle_decode(text, place.grid) for text in texts], axis=-1).astype(np.int8)
        masks[rle_decode(place.no_data, place.grid) > 0] = NO_DATA
        count = len(self._days)
        index = list(self._days).index(day) if day in self._days else count
        self._replaced += index < count
        with naming(self.path):
            for name, value in (("mask", masks), ("time", day), ("image", key)):
                array = self._group[name]
                if index == count:
                    array.resize((count + 1, *array.shape[1:]))
                array[index] = value
            self._days[day] = key
            self._checksums[index : index + 1] = [zlib.crc32(masks.tobytes())]
            self._group["mask"].attrs.update(crc32=self._checksums, crc32_axes=axis_checksums(self._group))
            _consolidate(self.path)

    def _open_existing(self) -> None:
        """Open the store, and remove what a killed process added after the last `.zmetadata`."""
        import zarr

        self._lock()
        committed = open_store(self.path, self.classes)
        self._days = stored_days(committed)
        unknown = [None] * len(self._days)  # in stores of earlier versions
        self._checksums = list(committed["mask"].attrs.get("crc32", unknown))
        for leftover in self.path.glob("*/*.partial"):  # of zarr
            leftover.unlink(missing_ok=True)
        self._group = zarr.open_group(self.path, mode="r+", zarr_format=2, use_consolidated=False)
        for name in ("mask", "time", "image"):
            array = self._group[name]
            if array.shape[0] != len(self._days):
                array.resize((len(self._days), *array.shape[1:]))

    def _create(self, place: MaskGrid) -> None:
        """Write an empty store beside `path`, and rename it."""
        remove_leftovers(self.path.parent)
        partial = partial_path(self.path)
        try:
            with naming(self.path):
                _write_empty(partial, place, self.classes)
                partial.rename(self.path)
        finally:
            remove_tree(partial)
        self._open_existing()

    def _lock(self) -> None:
        self._stack.enter_context(locked(self.path / ".lock", "wait for it, or give another `output`"))


def coordinates(place: MaskGrid) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return latitudes, from north to south, and longitudes of the centres of a grid's pixels."""
    position = place.position
    assert position is not None
    height, width = place.grid
    lat = position.north - position.pixel_height * (np.arange(height) + 0.5)
    lon = position.west + position.pixel_width * (np.arange(width) + 0.5)
    return np.round(lat, 9), np.round(lon, 9)


def _same(one: tuple[NDArray[np.float64], ...], other: tuple[NDArray[np.float64], ...]) -> bool:
    return all(a.shape == b.shape and np.allclose(a, b, atol=1e-6) for a, b in zip(one, other, strict=True))


def _describe(grid: tuple[NDArray[np.float64], NDArray[np.float64]]) -> str:
    lat, lon = grid
    return f"{len(lon)}x{len(lat)} from {lon[0]:g}, {lat[0]:g} to {lon[-1]:g}, {lat[-1]:g}"


def _number(date: datetime.date) -> int:
    return (date - _EPOCH).days


def _write_empty(path: Path, place: MaskGrid, classes: tuple[str, ...]) -> None:
    import zarr

    lat, lon = coordinates(place)
    group = zarr.create_group(path, zarr_format=2)
    group.attrs.update(
        {"Conventions": "CF-1.11", "title": "Daily masks of cloud organisation", "source": f"cloudrt {VERSION}"}
    )
    sizes = (1, min(len(lat), _SIDE), min(len(lon), _SIDE), len(classes))
    arrays: dict[str, tuple[tuple[str, ...], Any, tuple[int, ...], tuple[int, ...], Any, dict[str, Any]]] = {
        "mask": (
            ("time", "lat", "lon", "pattern"),
            "int8",
            (0, len(lat), len(lon), len(classes)),
            sizes,
            NO_DATA,
            {"long_name": "pattern is present", "flag_values": [0, 1], "flag_meanings": "absent present", "crc32": []},
        ),
        "time": (
            ("time",),
            "int32",
            (0,),
            (_DAYS_PER_CHUNK,),
            None,
            {"standard_name": "time", "units": f"days since {_EPOCH}", "calendar": "standard", "axis": "T"},
        ),
        "image": (("time",), str, (0,), (_DAYS_PER_CHUNK,), "", {"long_name": "key of the image"}),
    }
    for name, (dimensions, dtype, shape, chunks, fill, attributes) in arrays.items():
        named = {"_ARRAY_DIMENSIONS": list(dimensions), **attributes}
        group.create_array(name, shape=shape, chunks=chunks, dtype=dtype, fill_value=fill, attributes=named)
    fixed: dict[str, tuple[Any, dict[str, Any]]] = {
        "lat": (lat, {"standard_name": "latitude", "units": "degrees_north", "axis": "Y"}),
        "lon": (lon, {"standard_name": "longitude", "units": "degrees_east", "axis": "X"}),
        "pattern": (np.array(classes), {"long_name": "class"}),
    }
    for name, (values, attributes) in fixed.items():
        named = {"_ARRAY_DIMENSIONS": [name], **attributes}
        group.create_array(name, data=values, chunks=values.shape, fill_value=None, attributes=named)
    group["mask"].attrs["crc32_axes"] = axis_checksums(group)
    _consolidate(path)


def _consolidate(path: Path) -> None:
    """Write `.zmetadata`, which holds the metadata of all arrays, atomically."""
    files = [path / ".zgroup", path / ".zattrs", *sorted(path.glob("*/.zarray")), *sorted(path.glob("*/.zattrs"))]
    metadata = {file.relative_to(path).as_posix(): json.loads(file.read_text()) for file in files if file.exists()}
    with replacing(path / METADATA) as partial:
        partial.write_text(json.dumps({"metadata": metadata, "zarr_consolidated_format": 1}, indent=1))
