"""Overlap of tiles: agreement of a panorama of known images with these images, and steps at the borders of tiles.

    python -m cloudrt.bench.studies.tiles FOLDER

Images of one field of view, of which there must be at least four, are put side by side, two by two, and segmented as
one panorama for each overlap. Dice compares the masks with those of the single images. A step is the difference in
level of two neighbouring pixels; steps at the borders of tiles are compared with those elsewhere.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click
import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.geo.blend import Blend
from cloudrt.geo.tiles import Panorama, Tiling, open_panorama
from cloudrt.images.image import ImageFile, decode, find_images
from cloudrt.inference.panoramas import predict_panoramas
from cloudrt.inference.pipeline import Segmenter
from cloudrt.masks.metric import dice

OVERLAPS = (0.0, 0.1, 0.25, 0.4, 0.5)


def blended(segmenter: Segmenter, panorama: Panorama, overlap: float) -> NDArray[np.uint8]:
    """Return the levels of a panorama, (C, W, H), without presence and gate."""
    grid, labels = panorama.place.grid, segmenter.labels
    blend = Blend(grid, labels.submit_grid, len(labels.classes), overlap, panorama.beyond)
    for tile, inferred in zip(panorama.tiles, segmenter.infer(list(panorama.images)), strict=True):
        assert inferred.probability is not None
        blend.add(inferred.probability, tile.grid_x, tile.grid_y)
    return blend.finish()


def largest_steps(levels: NDArray[np.uint8], borders: set[int]) -> tuple[int, int]:
    """Return the largest step from one column to the next across the borders of tiles, and elsewhere."""
    steps = np.abs(np.diff(levels.astype(np.int16), axis=1)).max(axis=(0, 2))
    inside = [step for column, step in enumerate(steps, 1) if column not in borders]
    return max(int(steps[column - 1]) for column in borders), int(max(inside))


def main(folder: Path) -> None:
    """Print a table."""
    files = find_images(folder)[:4]
    images = [decode(file.path.read_bytes()) for file in files]
    mosaic = np.vstack([np.hstack(images[:2]), np.hstack(images[2:])])
    with tempfile.TemporaryDirectory() as temporary, Segmenter(provider="cpu", batch_size=1) as segmenter:
        path = Path(temporary, "mosaic.jpg")
        _, encoded = cv2.imencode(".jpg", mosaic[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
        path.write_bytes(encoded.tobytes())
        height, width = segmenter.labels.submit_grid
        alone = list(segmenter.predict(files))
        click.echo("overlap  tiles  Dice    largest step at borders / elsewhere")
        for overlap in OVERLAPS:
            tiling = Tiling(overlap)
            (result,) = predict_panoramas(segmenter, [ImageFile(path.name, path)], tiling)
            scores = [
                dice(result.mask(name)[y * height :, x * width :][:height, :width], alone[2 * y + x].mask(name))
                for name in segmenter.labels.classes
                for y in range(2)
                for x in range(2)
            ]
            panorama = open_panorama(path, segmenter.artifact, tiling, 10**9)
            levels = blended(segmenter, panorama, overlap)
            starts = {tile.grid_x for tile in panorama.tiles}
            borders = {at for start in starts for at in (start, start + width) if 0 < at < 2 * width}
            at, elsewhere = largest_steps(levels, borders)
            click.echo(f"{overlap:7}  {len(panorama.tiles):5}  {np.mean(scores):.4f}  {at} / {elsewhere}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
