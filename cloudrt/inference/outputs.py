"""The output formats of a submission (CSV, Parquet, COCO), and masks and overlays as image files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import DataError, ImageError
from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.images.headers import MAX_PIXELS
from cloudrt.images.image import Image, load_image
from cloudrt.inference.journal import Record
from cloudrt.labels import Labels
from cloudrt.masks.rle import rle_decode
from cloudrt.system.files import remove_tree, replacing, sha256

if TYPE_CHECKING:
    from cloudrt.geo.polygons import Feature

Records = Callable[[], Iterable[Record]]
"""Returns the finished images in order; can be called several times."""
SIMPLIFY = 0.5
"""Default of `FormatOptions.simplify`."""
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


class _Lines:
    """Converts the CR LF line ends of a `csv.writer` to LF.

    With CR LF as its line terminator, the writer quotes names that contain either character.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, line: str) -> int:
        """Write one row."""
        return self._file.write(line.removesuffix("\r\n") + "\n")


def write_csv(path: Path, records: Records, labels: Labels) -> None:
    """Write a row for each image and class with the columns `labels.header`, as the competition's scorer reads it."""
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(_Lines(file))
        writer.writerow(labels.header)
        for record in records():
            writer.writerows(
                (f"{record.key}_{label}", text) for label, text in zip(labels.classes, record.texts, strict=True)
            )


def write_parquet(path: Path, records: Records, labels: Labels) -> None:
    """Write a row for each image and class: image, label, rle (may be empty), error (null unless the image failed)."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema(
        [pyarrow.field(name, pyarrow.string(), nullable=name == "error") for name in ("image", "label", "rle", "error")]
    )
    with replacing(path) as partial, pyarrow.parquet.ParquetWriter(partial, schema, compression="zstd") as writer:
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

    if options.overwrite:
        remove_tree(path)
    with Store(path, labels.classes) as store:
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
"""Formats of masks with positions; images without one fail."""
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


def require_packages(form: str) -> None:
    """Import what a format needs, so that a run fails before anything slow if a package is not installed."""
    shapes = ("rasterio", "shapely", "pyproj")
    needs = {"parquet": ("pyarrow",), "geojson": shapes, "geoparquet": ("pyarrow", *shapes), "zarr": ("zarr",)}
    for name in needs.get(form, ()):
        import_module(name)


def output_digest(path: Path) -> str:
    """Return the SHA-256 of an output; of a zarr store, that of the metadata that is written last."""
    return sha256(path / ".zmetadata" if path.is_dir() else path)


def write_failures(path: Path, records: Records) -> None:
    """Write a CSV of image,reason with the images that failed; if there are none, remove an existing file."""
    failed = ((record.key, record.error) for record in records() if record.error is not None)
    first = next(failed, None)
    if first is None:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(_Lines(file))
        writer.writerows([("image", "reason"), first])
        writer.writerows(failed)


def write_masks(folder: Path, key: str, texts: Sequence[str], labels: Labels, place: MaskGrid | None = None) -> None:
    """Write one black-and-white PNG per class on the submission grid, FOLDER/CLASS/KEY.png, including empty masks.

    The masks of a panorama whose position is known are GeoTIFF files, FOLDER/CLASS/KEY.tif.
    """
    for label, text in zip(labels.classes, texts, strict=True):
        if place and place.position:
            from cloudrt.geo.geotiff import write_geotiff

            write_geotiff(folder / label / f"{key}.tif", text, place)
            continue
        mask = rle_decode(text, labels.submit_grid) * 255
        _write_picture(folder / label / f"{key}.png", mask, [cv2.IMWRITE_PNG_BILEVEL, 1])


def write_overlay(
    folder: Path, key: str, source: Path, texts: Sequence[str], labels: Labels, max_pixels: int = MAX_PIXELS
) -> None:
    """Write FOLDER/KEY.jpg: the image on the submission grid, with the mask of each class in the colour of the class.

    Nothing is written if the image cannot be read.
    """
    try:
        image = load_image(source, labels.submit_grid, max_pixels)
    except ImageError:
        return
    picture = draw_masks(image, texts, labels)[..., ::-1]
    _write_picture(folder / f"{key}.jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 90])


def draw_masks(image: Image, texts: Sequence[str], labels: Labels) -> Image:
    """Return an image with the mask of each class in the colour of the class, and the names of the classes.

    Parameters
    ----------
    image
        (H, W, 3) uint8 RGB, of the size of the submission grid.
    texts
        RLE texts on the submission grid, one per class.
    labels
        Classes and grids.
    """
    from cloudrt.labels import class_colours

    picture = image[..., ::-1].copy()
    names = []
    for label, text, colour in zip(labels.classes, texts, class_colours(len(texts)), strict=True):
        if text:
            mask = rle_decode(text, labels.submit_grid)
            blue_green_red = [int(colour[i : i + 2], 16) for i in (5, 3, 1)]
            on = mask.astype(bool)
            picture[on] = (0.65 * picture[on] + 0.35 * np.array(blue_green_red)).astype(np.uint8)
            contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(picture, contours, -1, blue_green_red, 2)
            names.append((label, blue_green_red))
    scale = max(0.45, max(labels.submit_grid) / 1000)
    line = int(34 * scale)
    for row, (label, blue_green_red) in enumerate(names):
        (width, _), _ = cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
        cv2.rectangle(picture, (0, row * line), (width + 12, (row + 1) * line), (0, 0, 0), cv2.FILLED)
        place = (6, int((row + 0.75) * line))
        cv2.putText(picture, label, place, cv2.FONT_HERSHEY_SIMPLEX, scale, blue_green_red, 1, cv2.LINE_AA)
    return np.asarray(picture[..., ::-1], np.uint8)


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


def _write_picture(path: Path, picture: NDArray[np.uint8], options: Sequence[int]) -> None:
    done, data = cv2.imencode(path.suffix, picture, options)
    if not done:
        raise DataError(f"{path} cannot be encoded as an image")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, sync=False) as partial:
        partial.write_bytes(data.tobytes())
