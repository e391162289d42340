"""GeoJSON answers: a feature for each component, as `cloudrt-infer --format geojson` writes them.

The coordinates are longitude and latitude if the position of an image is known: from the GeoTIFF tags of the upload,
the bounds in the request, or the name of the file, in this order. Otherwise they are pixels of the submission grid.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import simplejpeg

from cloudrt.geo.bounds import Bounds
from cloudrt.geo.components import component_means
from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.geo.polygons import Feature, features, pixel_features
from cloudrt.geo.positions import check_degrees, read_position
from cloudrt.images.image import decode, is_plain_jpeg
from cloudrt.inference.outputs import SIMPLIFY
from cloudrt.labels import Labels
from cloudrt.masks.rle import rle_decode
from cloudrt.serve.answers import Segmented
from cloudrt.system.versions import install_command

_PACKAGES = ("pyproj", "rasterio", "shapely")


def missing_packages() -> str:
    """Return what to install for GeoJSON; "" if nothing is missing."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    return f"application/geo+json needs {', '.join(missing)}: {install_command('geo')}" if missing else ""


def locate(name: str, data: bytes, labels: Labels, bounds: Bounds | None, max_pixels: int) -> MaskGrid:
    """Return the grid of the masks of an image that was decoded, and its position.

    Raises
    ------
    ImageError
        See `read_position` and `check_degrees`.
    """
    if is_plain_jpeg(data, max_pixels):
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    else:  # it may have a rotation
        height, width, _ = decode(data, max_pixels=max_pixels).shape
    grid, position = labels.submit_grid, read_position(Path(name), (height, width), bounds, data)
    if position is None:
        return MaskGrid(grid)
    placed = replace(
        position,
        pixel_width=position.pixel_width * width / grid[1],
        pixel_height=position.pixel_height * height / grid[0],
    )
    check_degrees(placed, grid)
    return MaskGrid(grid, placed)


def feature_collection(
    names: Sequence[str], results: Sequence[Segmented | str], labels: Labels, label: str | None
) -> str:
    """Return the polygons of images as a FeatureCollection; its member `images` describes each image.

    Parameters
    ----------
    names
        Names of the images.
    results
        The result of each image, with its place, or why it failed.
    labels
        Classes and grids.
    label
        The class whose polygons are returned; None for all.
    """
    found: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    for name, result in zip(names, results, strict=True):
        place = None if isinstance(result, str) else result.place
        position = place and place.position
        images.append(
            {
                "image": name,
                "error": result if isinstance(result, str) else None,
                "coordinates": None if place is None else "pixels" if position is None else "degrees",
                "position": position.source if position else None,
            }
        )
        if not isinstance(result, str):
            found += [one.to_dict() for one in _features(name, result, labels, label)]
    return json.dumps({"type": "FeatureCollection", "grid": labels.submit_grid, "images": images, "features": found})


def _features(name: str, result: Segmented, labels: Labels, label: str | None) -> Iterator[Feature]:
    assert result.place is not None
    kept = [index for index, one in enumerate(labels.classes) if label in (None, one)]
    texts = [result.texts[index] for index in kept]
    means = tuple(
        component_means(rle_decode(text, labels.submit_grid), result.outputs.levels[index]) if text else ()
        for index, text in zip(kept, texts, strict=True)
    )
    rle = dict(zip((labels.classes[index] for index in kept), texts, strict=True))
    outline = pixel_features if result.place.position is None else features
    return outline(name, rle, replace(result.place, means=means), SIMPLIFY)
