"""Opening a store of daily masks, with checks of its metadata and of the values along its axes.

The metadata file of each array must equal its copy in `.zmetadata`, except for the number of days and the checksums,
which an append changes before it replaces `.zmetadata`. The values along each axis must match their checksum. Masks are
checked when `cloudrt grid` reads them.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from cloudrt.errors import DataError

METADATA = ".zmetadata"
AXES = ("time", "image", "lat", "lon", "pattern")
_CHECKSUMS = ("crc32", "crc32_axes")


def check_store(path: Path) -> None:
    """Raise DataError if a path is no store, or one whose metadata or axes are damaged; masks are not read."""
    open_store(path, None)


def open_store(path: Path, classes: tuple[str, ...] | None) -> Any:
    """Return the group as the last `.zmetadata` describes it; DataError if it is no store, or has other classes."""
    import zarr

    if not (path / METADATA).is_file():
        raise DataError(f"{path} is not a store that cloudrt-infer --format zarr wrote: no consolidated metadata")
    try:
        group: Any = zarr.open_group(path, mode="r", zarr_format=2, use_consolidated=True)
        for name in ("mask", *AXES):
            if name not in group:
                raise DataError(f"no {name}")
        found = tuple(str(name) for name in group["pattern"][:])
        _check(path, group)
    except Exception as error:  # zarr and its codecs raise many kinds for damaged files
        raise DataError(f"{path} is not a store that cloudrt-infer --format zarr wrote, or damaged: {error}") from error
    if classes is not None and found != classes:
        raise DataError(f"{path} holds the patterns {', '.join(found)}: give another `output`")
    return group


def axis_checksums(group: Any) -> list[int]:
    """Return the checksum of the values of each array of `AXES`."""
    return [zlib.crc32(json.dumps(group[name][:].tolist()).encode()) for name in AXES]


def stored_days(group: Any) -> dict[int, str]:
    """Return the days of a store, as numbers, with the keys of their images."""
    return {int(day): str(key) for day, key in zip(group["time"][:], group["image"][:], strict=True)}


def _check(path: Path, group: Any) -> None:
    """Raise DataError if metadata files differ from `.zmetadata`, or the values along an axis are damaged."""
    held = json.loads((path / METADATA).read_text())["metadata"]
    for name, values in held.items():
        if _fixed(name, json.loads((path / name).read_text())) != _fixed(name, values):
            raise DataError(f"{name} differs from {METADATA}")
    attributes = group["mask"].attrs
    checksums = dict(zip(AXES, attributes.get("crc32_axes", ()), strict=False))  # absent in stores of earlier versions
    for name, found in zip(AXES, axis_checksums(group), strict=True):
        if checksums.get(name, found) != found:
            raise DataError(f"the values of {name} do not match their checksum")
    days = group["mask"].shape[0]
    if any(len(set(group[name][:].tolist())) != days for name in ("time", "image")):
        raise DataError(f"two of its {days} days have the same date or image")
    for name in ("lat", "lon"):
        steps = np.diff(group[name][:])
        if not np.allclose(steps, steps[:1], rtol=1e-3) or not steps.all():
            raise DataError(f"the values of {name} are not evenly spaced")


def _fixed(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a metadata file, such as mask/.zarray, that an append does not change."""
    if name.partition("/")[0] not in ("mask", "time", "image"):
        return values
    kept = {key: value for key, value in values.items() if key not in _CHECKSUMS}
    return kept | {"shape": kept["shape"][1:]} if "shape" in kept else kept
