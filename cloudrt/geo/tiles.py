"""A panorama: an image of any size as tiles of the field of view that the network was trained on.

    file -> position -> one decode, at a small scale -> tiles, column by column -> the network's input
                                                    `-> pixels without data

Lengths are in three units: pixels of the image, pixels at the resolution of training (the panorama is `size`
of these), and pixels of the grid of its masks, each of which covers a block of pixels at the resolution of training.
`cloudrt.geo.tiling` places the tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import ImageError
from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.geo.positions import Position, check_degrees, read_position
from cloudrt.geo.tiling import SCALES, Tiling, offsets
from cloudrt.images.image import NO_DATA_LEVEL, Image, decode, is_plain_jpeg, read_file
from cloudrt.images.resize import reduce, resize
from cloudrt.labels import Grid
from cloudrt.masks.postprocess import encode_mask
from cloudrt.model.artifact import Artifact

MORE_PIXELS = 10
"""A panorama may have this many times the `max_pixels` of `RunOptions`."""
_MOST_PADDED = 2**27
"""A tile that reaches beyond its image is shrunk before it is padded, if it has more pixels than this."""
_LONGEST = 2**20
"""Largest side, in pixels at the resolution of training, of a panorama with a position."""


@dataclass(frozen=True)
class Tile:
    """A tile, by the column and row of its first pixel: at the resolution of training, and on the grid."""

    x: int
    y: int
    grid_x: int
    grid_y: int


@dataclass(frozen=True)
class Panorama:
    """A panorama, decoded and cut into tiles.

    Parameters
    ----------
    tiles
        Its tiles, column by column.
    cut
        Returns a tile at the size of the network's input, (H, W, 3) uint8 RGB; black beyond the edge of the image.
    place
        Grid and position of its masks; its `means` are empty.
    beyond
        See `cloudrt.geo.blend.Blend`.
    """

    tiles: list[Tile]
    cut: Callable[[Tile], Image]
    place: MaskGrid
    beyond: int | None = None


@dataclass(frozen=True)
class _Decoded:
    """A decoded panorama.

    Parameters
    ----------
    image
        (H, W, 3) uint8 RGB.
    native
        Height and width of the file.
    size
        Height and width at the resolution of training.
    scale
        Rows and columns of `image` per pixel at the resolution of training.
    shrunk
        Whether libjpeg-turbo decoded it at `scale`; if not, each tile is reduced as libjpeg-turbo would.
    """

    image: Image
    native: Grid
    size: Grid
    scale: tuple[float, float]
    shrunk: bool


def open_panorama(path: Path, artifact: Artifact, tiling: Tiling, max_pixels: int) -> Panorama:
    """Decode a panorama once, and cut it into tiles.

    Parameters
    ----------
    path
        The image.
    artifact
        States the field of view, the input size and the grids.
    tiling
        How to cut it.
    max_pixels
        Larger panoramas are refused.

    Raises
    ------
    ImageError
        See `cloudrt.images.image.decode` and `read_position`; oversized; no position, or one without longitudes and
        latitudes, if it is needed.
    """
    data = read_file(path)
    plain = is_plain_jpeg(data, max_pixels)
    whole = None if plain else decode(data, max_pixels=max_pixels)
    native = _jpeg_size(data) if whole is None else (whole.shape[0], whole.shape[1])
    position = read_position(path, native, tiling.bounds)
    if position is None and tiling.needs_position:
        raise ImageError("has no position: no GeoTIFF tags, no world file, no bounds, and none in its name")
    size = _size(native, position, artifact)
    if math.prod(size) > max_pixels:
        raise ImageError(f"is oversized: {size[1]}x{size[0]} pixels at {artifact.pixels_per_degree:g} per degree")
    # As `load_image`: the smallest scale at which a tile covers the network's input.
    zoom = native[0] / size[0], native[1] / size[1]
    eighths = SCALES if whole is not None else _eighths(artifact, zoom)
    cover = -(-native[0] * eighths // SCALES), -(-native[1] * eighths // SCALES)
    image = decode(data, cover, max_pixels) if whole is None else whole
    scale = zoom[0] * eighths / SCALES, zoom[1] * eighths / SCALES
    decoded = _Decoded(image=image, native=native, size=size, scale=scale, shrunk=whole is None)
    place = _place(decoded, position, artifact)
    if place.position is not None and tiling.needs_position:
        check_degrees(place.position, place.grid)
    return _lay_out(decoded, place, artifact, tiling)


def _jpeg_size(data: bytes) -> Grid:
    import simplejpeg

    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    return height, width


def _size(native: Grid, position: Position | None, artifact: Artifact) -> Grid:
    """Return height and width at the resolution of training."""
    height, width = native
    if position is None:
        small = height <= artifact.field_of_view[0] and width <= artifact.field_of_view[1]
        return artifact.field_of_view if small else native
    scale = position.degrees_per_unit * artifact.pixels_per_degree
    found = []
    for length, pixel in ((height, position.pixel_height), (width, position.pixel_width)):
        exact = length * pixel * scale
        if not exact <= _LONGEST:
            raise ImageError(f"is oversized: {exact:g} pixels on one side, at the resolution of training")
        found.append(length if abs(exact / length - 1) < 0.005 else max(1, round(exact)))
    return found[0], found[1]


def _eighths(artifact: Artifact, zoom: tuple[float, float]) -> int:
    """Return the smallest n such that, decoded at n/8 of its size, a tile covers the network's input."""
    for eighths in range(1, SCALES):
        sizes = (
            math.ceil(length * times * eighths / SCALES - 1e-6)
            for length, times in zip(artifact.field_of_view, zoom, strict=True)
        )
        if all(size >= least for size, least in zip(sizes, artifact.input_size, strict=True)):
            return eighths
    return SCALES


def _block(artifact: Artifact) -> Grid:
    """Return height and width, at the resolution of training, of a pixel of the grid."""
    view, grid = artifact.field_of_view, artifact.labels.submit_grid
    return view[0] // grid[0], view[1] // grid[1]


def _place(decoded: _Decoded, position: Position | None, artifact: Artifact) -> MaskGrid:
    """Return the grid of the masks and its position; which pixels have no data is not known yet."""
    native, size, block = decoded.native, decoded.size, _block(artifact)
    grid = -(-size[0] // block[0]), -(-size[1] // block[1])
    if position is None:
        return MaskGrid(grid)
    placed = replace(
        position,
        pixel_width=position.pixel_width * native[1] / size[1] * block[1],
        pixel_height=position.pixel_height * native[0] / size[0] * block[0],
    )
    fits = size[1] % block[1] == 0 and size[1] >= artifact.field_of_view[1]
    return MaskGrid(grid, placed, wraps=fits and position.wraps(native[1]))


def _lay_out(decoded: _Decoded, place: MaskGrid, artifact: Artifact, tiling: Tiling) -> Panorama:
    view, grid, block = artifact.field_of_view, artifact.labels.submit_grid, _block(artifact)
    size, scale, wraps = decoded.size, decoded.scale, place.wraps
    rows = offsets(size[0], view[0], math.lcm(SCALES, block[0]), tiling.overlap)
    columns = offsets(size[1], view[1], math.lcm(SCALES, block[1]), tiling.overlap, wraps)
    no_data = _no_data(decoded.image, (scale[0] * block[0], scale[1] * block[1]), place.grid)
    tiles = [Tile(x, y, x // block[1], y // block[0]) for x in columns for y in rows]
    return Panorama(
        tiles=tiles,
        cut=partial(_cut, decoded, artifact, wraps),
        place=replace(place, no_data=encode_mask(no_data)),
        beyond=columns[-1] // block[1] + grid[1] - place.grid[1] if wraps else None,
    )


def _cut(decoded: _Decoded, artifact: Artifact, wraps: bool, tile: Tile) -> Image:
    image = decoded.image
    width = image.shape[1]
    (top, bottom), (left, right) = (
        (round(at * times), round(at * times) + math.ceil(length * times - 1e-6))
        for at, length, times in zip((tile.y, tile.x), artifact.field_of_view, decoded.scale, strict=True)
    )
    part = image[top:bottom, left:right]
    if wraps and right > width:
        part = np.hstack((part, image[top:bottom, : right - width]))
    if part.shape[:2] != (bottom - top, right - left):
        part = _padded(part, (bottom - top, right - left), artifact.input_size)
    return resize(part if decoded.shrunk else reduce(part, artifact.input_size), artifact.input_size)


def _padded(part: Image, size: Grid, least: Grid) -> Image:
    """Return the part of a tile that the image covers, padded with black below and to its right.

    The result has `size`, or, where that would take too much memory because the pixels of the image are very small,
    about twice `least`.
    """
    if math.prod(size) > _MOST_PADDED:
        steps = [max(1, side // (2 * fewest)) for side, fewest in zip(size, least, strict=True)]
        size = -(-size[0] // steps[0]), -(-size[1] // steps[1])
        part = resize(part, (-(-part.shape[0] // steps[0]), -(-part.shape[1] // steps[1])))
    whole = np.zeros((*size, 3), np.uint8)
    whole[: part.shape[0], : part.shape[1]] = part
    return whole


def _no_data(image: Image, step: tuple[float, float], grid: Grid) -> NDArray[np.uint8]:
    """Return a mask of `grid`, (H, W) uint8: 1 where at most half of a pixel has data.

    `step` is the number of image rows and columns, not always whole, of one pixel of the grid.
    """
    height, width = image.shape[:2]
    dark = np.asarray(cv2.inRange(image, (0, 0, 0), (NO_DATA_LEVEL,) * 3), np.uint8)
    if not dark.any():
        return np.zeros(grid, np.uint8)
    down, right = max(0, round(grid[0] * step[0]) - height), max(0, round(grid[1] * step[1]) - width)
    dark = np.asarray(cv2.copyMakeBorder(dark, 0, down, 0, right, cv2.BORDER_REPLICATE), np.uint8)
    shrinks = dark.shape[0] >= grid[0] and dark.shape[1] >= grid[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return (np.asarray(cv2.resize(dark, (grid[1], grid[0]), interpolation=method)) > 127).astype(np.uint8)
