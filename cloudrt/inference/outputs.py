"""The output formats of a submission: CSV, Parquet, COCO, and those with positions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.inference.journal_records import Record
from cloudrt.labels import Labels
from cloudrt.masks.rle import rle_decode
from cloudrt.system.files import replacing, replacing_folder, sha256

if TYPE_CHECKING:
    from cloudrt.geo.polygons import Feature

Records = Callable[[], Iterable[Record]]
"""Returns the finished images in order; can be called several times."""
SIMPLIFY = 0.5
"""Default of `FormatOptions.simplify`."""
_SPECIAL = re.compile(r'[",\r\n]')
ROW_GROUP = 100_000
"""Rows per row group of Parquet, which are kept in memory until they are written."""


@dataclass(frozen=True)
class FormatOptions:
    """Options of output formats.

    Parameters
    ----------
    simplify
        Outlines of polygons may deviate by this many pixels of the masks.
    overwrite
        Whether a zarr store is replaced instead of appended to.
    """

    simplify: float = SIMPLIFY
    overwrite: bool = False


def write_csv(path: Path, records: Records, labels: Labels) -> None:
    """Write a row for each image and class with the columns `labels.header`, as the competition's scorer reads it."""
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        file.write(_row(labels.header))
        for record in records():  # RLE texts need no quotes; the csv module would check every character
            names = [_quoted(f"{record.key}_{label}") for label in labels.classes]
            file.write("".join(f"{name},{text}\n" for name, text in zip(names, record.texts, strict=True)))


def _row(fields: Iterable[str]) -> str:
    return ",".join(map(_quoted, fields)) + "\n"


def _quoted(field: str) -> str:
    """Return a field of a CSV file, in quotes if it contains a comma, a quote or a line break."""
    return '"' + field.replace('"', '""') + '"' if _SPECIAL.search(field) else field


def write_parquet(path: Path, records: Records, labels: Labels) -> None:
    """Write a row for each image and class: image, label, rle (may be empty), error (null unless the image failed)."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema(
        [pyarrow.field(name, pyarrow.string(), nullable=name == "error") for name in ("image", "label", "rle", "error")]
    )
    with (
        replacing(path) as partial,
        partial.open("wb") as file,  # pyarrow refuses names that are not UTF-8
        pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        rows: list[dict[str, str | None]] = []
        for record in records():
            rows += [
                {"image": record.key, "label": label, "rle": text, "error": record.error}
                for label, text in zip(labels.classes, record.texts, strict=True)
            ]
            if len(rows) >= ROW_GROUP:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                rows = []
        writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def write_coco(path: Path, records: Records, labels: Labels) -> None:
    """Write a COCO data set: each 8-connected component of a class is an instance, with compressed RLE.

    Image sizes are those of the submission grid, or of a panorama's grid.
    Format: https://cocodataset.org/#format-data, read by pycocotools.
    """
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        categories = [{"id": number, "name": label} for number, label in enumerate(labels.classes, 1)]
        file.write('{"info": {"description": "cloudrt"}, "categories": ' + json.dumps(categories) + ', "images": [')
        for number, record in enumerate(records(), 1):
            height, width = record.place.grid if record.place else labels.submit_grid
            image = {"id": number, "file_name": record.key, "height": height, "width": width}
            file.write((",\n" if number > 1 else "\n") + json.dumps(image))
        file.write('\n], "annotations": [')
        count = 0
        for number, record in enumerate(records(), 1):
            for category, text in enumerate(record.texts, 1):
                for instance in _instances(text, record.place.grid if record.place else labels.submit_grid):
                    count += 1
                    known = {"id": count, "image_id": number, "category_id": category, "iscrowd": 0}
                    file.write((",\n" if count > 1 else "\n") + json.dumps(known | instance))
        file.write("\n]}\n")


def write_geojson(path: Path, records: Records, labels: Labels, options: FormatOptions) -> None:
    """Write a FeatureCollection with a polygon for each component; see `cloudrt.geo.polygons`."""
    from cloudrt.geo import polygons

    polygons.write_geojson(path, _features(records, labels, options))


def write_geoparquet(path: Path, records: Records, labels: Labels, options: FormatOptions) -> None:
    """Write a row for each component, with its polygon as WKB; see `cloudrt.geo.polygons`."""
    from cloudrt.geo import polygons

    polygons.write_geoparquet(path, _features(records, labels, options))


def write_zarr(path: Path, records: Records, labels: Labels, options: FormatOptions) -> None:
    """Append each panorama as a day to a zarr store; see `cloudrt.geo.store`."""
    from cloudrt.geo.store import Store

    opened = replacing_folder(path) if options.overwrite else nullcontext(path)
    with opened as folder, Store(folder, labels.classes) as store:
        for record in records():
            if record.error is None and record.place is not None:
                store.append(record.key, record.texts, record.place)


def _features(records: Records, labels: Labels, options: FormatOptions) -> Iterator[Feature]:
    from cloudrt.geo.polygons import features

    for record in records():
        if record.error is None and record.place is not None:
            rle = dict(zip(labels.classes, record.texts, strict=True))
            yield from features(record.key, rle, record.place, options.simplify)


FORMATS: dict[str, Callable[[Path, Records, Labels], None]] = {
    "csv": write_csv,
    "parquet": write_parquet,
    "coco": write_coco,
}
PLACED: dict[str, Callable[[Path, Records, Labels, FormatOptions], None]] = {
    "geojson": write_geojson,
    "geoparquet": write_geoparquet,
    "zarr": write_zarr,
}
"""Formats of masks with positions; images without a position fail."""
OUTLINES = ("geojson", "geoparquet")
"""Formats of polygons."""
SUFFIXES = {
    "csv": ".csv",
    "parquet": ".parquet",
    "coco": ".json",
    "geojson": ".geojson",
    "geoparquet": ".geoparquet",
    "zarr": ".zarr",
}


def write_rows(path: Path, form: str, records: Records, labels: Labels, options: FormatOptions | None = None) -> None:
    """Write the output of a run in one of the formats of `SUFFIXES`."""
    if form in PLACED:
        PLACED[form](path, records, labels, options or FormatOptions())
    else:
        FORMATS[form](path, records, labels)


def require_packages(form: str, *, geotiff: bool = False) -> None:
    """Import what a run needs, so that it fails before anything slow if a package is not installed.

    Parameters
    ----------
    form
        One of `SUFFIXES`.
    geotiff
        Whether GeoTIFF tags are read or written.

    Raises
    ------
    ModuleNotFoundError
        A package is not installed.
    """
    shapes = ("rasterio", "shapely", "pyproj")
    needs = {"parquet": ("pyarrow",), "geojson": shapes, "geoparquet": ("pyarrow", *shapes), "zarr": ("zarr",)}
    for name in (*needs.get(form, ()), *(("rasterio",) if geotiff else ())):
        import_module(name)


def output_digest(path: Path) -> str:
    """Return the SHA-256 of an output; for a zarr store, that of its metadata, which is written last.

    "" if there is no output: a store is created with its first day.
    """
    if not path.exists():
        return ""
    return sha256(path / ".zmetadata" if path.is_dir() else path)


def write_failures(path: Path, records: Records) -> None:
    """Write a CSV of image,reason with the images that failed; if there are none, remove an existing file."""
    failed = (_row((record.key, record.error)) for record in records() if record.error is not None)
    first = next(failed, None)
    if first is None:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        file.writelines((_row(("image", "reason")), first))
        file.writelines(failed)


def compress_counts(counts: Sequence[int]) -> str:
    """Return run lengths as the text of COCO's compressed RLE.

    From the fourth on, each length is stored as the difference from the length two positions before. Values are split
    into groups of 5 bits, lowest first, and a sixth bit is set if another group follows. Each group is written as the
    ASCII character 48 + group. Source: `rleToString` in maskApi.c of pycocotools.
    """
    letters = []
    for i, count in enumerate(counts):
        left = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            bits = left & 31
            left >>= 5
            more = left != -1 if bits & 16 else left != 0
            letters.append(chr((bits | 32 if more else bits) + 48))
    return "".join(letters)


def _instances(text: str, grid: tuple[int, int]) -> Iterator[dict[str, object]]:
    if not text:
        return
    components, numbers, stats, _ = cv2.connectedComponentsWithStats(rle_decode(text, grid), connectivity=8)
    for component in range(1, components):
        left, top, width, height, area = (int(value) for value in stats[component])
        yield {
            "area": area,
            "bbox": [left, top, width, height],
            "segmentation": {"size": list(grid), "counts": compress_counts(_counts(numbers == component))},
        }


def _counts(mask: NDArray[np.bool_]) -> list[int]:
    """Return the run lengths of an (H, W) mask in column-major order, alternately of pixels that are off and on."""
    column_major = mask.T.ravel()
    edges = np.flatnonzero(np.diff(column_major, prepend=False, append=not column_major[-1]))
    counts: list[int] = np.diff(edges, prepend=0).tolist()
    return counts
