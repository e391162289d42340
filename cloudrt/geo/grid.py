"""Daily frequencies on a coarse grid, from a store of daily masks.

    mask(time, lat, lon, pattern) -> freq(time, lat, lon, pattern), valid(time, lat, lon)

`freq` is the share of a cell's pixels with data that a pattern covers, and `valid` the share of its pixels that have
data. Days are read one at a time.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import DataError
from cloudrt.geo.store_checks import check_store
from cloudrt.system.files import naming, replacing, replacing_folder
from cloudrt.system.paths import check_outputs

SUFFIXES = (".nc", ".zarr")


def write_frequencies(store: Path, output: Path, degrees: float, *, overwrite: bool = False) -> tuple[int, int, int]:
    """Compute the frequencies and write them as NetCDF 4 or zarr, by the suffix of `output`.

    Parameters
    ----------
    store
        A store that `cloudrt-infer --format zarr` wrote.
    output
        A path that ends in .nc or .zarr.
    degrees
        Side of a cell; cells begin at -90 and -180, and hold the pixels whose centres lie in them.
    overwrite
        Whether to replace an existing output.

    Returns
    -------
    days, rows, columns
        The size of the grid.

    Raises
    ------
    DataError
        `store` is no such store, holds no days or a damaged mask, or lies in `output`; `degrees` or `output` cannot be
        used.
    OSError
        The output cannot be written.
    """
    import xarray

    if output.suffix not in SUFFIXES:
        raise DataError(f"{output}: the name must end in {' or '.join(SUFFIXES)}")
    if not 0 < degrees <= 180:
        raise DataError(f"degrees must be more than 0 and at most 180, found {degrees:g}")
    if not store.exists():
        raise DataError(f"{store} is missing: write one with cloudrt-infer --format zarr")
    check_store(store)
    if output.resolve().is_relative_to(store.resolve()):
        raise DataError(f"{output} lies below STORE {store}: use another name")
    folder = output.suffix == ".zarr"
    named = {"`output`": output}
    check_outputs({} if folder else named, {"STORE": store}, stores=named if folder else {}, overwrite=overwrite)
    try:
        with xarray.open_zarr(store, consolidated=True, mask_and_scale=False, chunks=None) as data:
            if not data.sizes["time"]:
                raise DataError("it holds no days")
            found = frequencies(data, degrees)
    except (DataError, MemoryError, RuntimeError, ValueError) as error:  # codecs raise these too
        raise DataError(f"{store}: {error}") from error
    with naming(output):
        if not folder:
            with replacing(output) as partial:
                found.to_netcdf(partial, engine="h5netcdf")
        else:
            with replacing_folder(output) as partial:
                found.to_zarr(partial, zarr_format=2, consolidated=True)
    return found.sizes["time"], found.sizes["lat"], found.sizes["lon"]


def frequencies(data: Any, degrees: float) -> Any:
    """Return the frequencies of a store, opened with `mask_and_scale=False`, as an xarray.Dataset.

    Raises
    ------
    DataError
        The mask of a day does not match its checksum: chunks are missing, damaged, or of two masks.
    """
    import xarray

    lat, first_row, rows = cells(data["lat"].values, -90, degrees)
    lon, first_column, columns = cells(data["lon"].values, -180, degrees)
    total = np.outer(rows, columns)
    days, patterns = data.sizes["time"], data.sizes["pattern"]
    freq = np.full((days, len(lat), len(lon), patterns), np.nan, np.float32)
    valid = np.zeros((days, len(lat), len(lon)), np.float32)

    checksums = data["mask"].attrs.get("crc32", [])
    for day in range(days):
        mask = data["mask"][day].values
        if day < len(checksums) and checksums[day] not in (None, zlib.crc32(mask.tobytes())):
            raise DataError(f"the mask of day {day} ({data['image'][day].values!s}) is damaged: append its image again")
        known = cell_sums(mask[..., 0] >= 0, first_row, first_column)
        valid[day] = known / total
        for pattern in range(patterns):
            on = cell_sums(mask[..., pattern] > 0, first_row, first_column)
            np.divide(on, known, out=freq[day, ..., pattern], where=known > 0, casting="unsafe")
    result = xarray.Dataset(
        {
            "freq": (
                ("time", "lat", "lon", "pattern"),
                freq,
                {"long_name": "share of the valid area covered by the pattern", "units": "1"},
            ),
            "valid": (("time", "lat", "lon"), valid, {"long_name": "share of the area with data", "units": "1"}),
        },
        {
            "time": data["time"],
            "lat": ("lat", lat, data["lat"].attrs),
            "lon": ("lon", lon, data["lon"].attrs),
            "pattern": ("pattern", data["pattern"].values.astype(str), data["pattern"].attrs),
        },
        dict(data.attrs) | {"title": f"Daily frequencies of cloud organisation on {degrees:g} degrees"},
    )
    for variable in result.variables.values():
        variable.encoding = {}
    return result


def cell_sums(
    pixels: NDArray[np.bool_], first_row: NDArray[np.int64], first_column: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the number of pixels that are on in each cell; `cells` returns the first row and column of each."""
    by_row = np.add.reduceat(pixels, first_row, axis=0, dtype=np.int64)
    return np.asarray(np.add.reduceat(by_row, first_column, axis=1))


def cells(
    centres: NDArray[np.float64], origin: float, degrees: float
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the centre, first pixel and number of pixels of each cell, given the `centres` of pixels along an axis."""
    numbers = np.floor((centres - origin) / degrees + 1e-9).astype(np.int64)
    first = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 1))
    middles = (origin + (numbers[first] + 0.5) * degrees).astype(np.float64)
    return middles, first.astype(np.int64), np.diff(first, append=len(numbers)).astype(np.int64)
