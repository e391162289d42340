"""Masks and overlays as image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import DataError, ImageError
from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.images.headers import MAX_PIXELS
from cloudrt.images.image import Image, load_image
from cloudrt.labels import Labels, class_colours
from cloudrt.masks.rle import rle_decode
from cloudrt.system.files import replacing


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


def _write_picture(path: Path, picture: NDArray[np.uint8], options: Sequence[int]) -> None:
    done, data = cv2.imencode(path.suffix, picture, options)
    if not done:
        raise DataError(f"{path} cannot be encoded as an image")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, sync=False) as partial:
        partial.write_bytes(data.tobytes())
