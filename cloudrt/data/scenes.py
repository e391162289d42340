"""A synthetic satellite scene: trade-wind clouds over dark ocean, with boxes like those of human labellers.

    cells -> patches -> potential (plan) + weighted octaves -> opacity -> over the ocean -> glint, drift -> bands
                 `-> jittered boxes, minus the bands -> masks (label grid)

Positions are fractions of the width and height, so that a seed gives the same scene at every size. The frame is cut
into cells, some of which become patches of one organisation. Each patch draws a potential, the local tendency to form
clouds, on a small fixed grid (the plan). It is resized to the image; a pyramid of noise is added, whose octaves each
organisation weights differently; a soft threshold turns the sum into opacity. Ocean, haze, clouds, sun glint and the
black bands between two swaths are composed in this order.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.data.textures import ASPECT, PLAN, TEXTURES, Box, Floats, Texture, noise, potential, resize
from cloudrt.errors import DataError
from cloudrt.images.resize import resize as resize_image
from cloudrt.labels import CLASSES, LABEL_GRID, Grid

MIN_SIDE = 64
MAX_SIDE = 8192
SCENES = 16
"""Number of different scenes that `make_samples` draws."""

# Fraction of images with 1, 2, 3 and 4 organisations, and the probability of each class when they are drawn: the
# classes become as frequent as in the competition's train.csv (Fish 0.50, Flower 0.43, Gravel 0.53, Sugar 0.68).
_CLASS_COUNTS = (0.24, 0.43, 0.28, 0.05)
_CLASS_WEIGHTS = {"Fish": 0.21, "Flower": 0.17, "Gravel": 0.24, "Sugar": 0.38}

# Octaves of the noise, by the number of cells across the width.
_CELLS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class SyntheticScene:
    """An image and its labels.

    Parameters
    ----------
    image
        (H, W, 3) uint8, RGB; exactly 0 in the bands and nowhere else.
    masks
        (C, 1400, 2100) uint8, 0 or 1, in the order of `cloudrt.labels.CLASSES`: unions of boxes minus the bands, on
        the label grid for every size of the image.
    bands
        (H, W) bool: pixels without data.
    """

    image: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    bands: NDArray[np.bool_]


def check_size(size: tuple[int, int]) -> None:
    """Raise DataError unless height and width are from 64 to 8192 pixels."""
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in size):
        raise DataError(f"a scene must be {MIN_SIDE} to {MAX_SIDE} pixels wide and high, found {size[1]}x{size[0]}")


def draw_scene(seed: int | np.random.SeedSequence, size: tuple[int, int] = LABEL_GRID) -> SyntheticScene:
    """Draw a scene.

    Parameters
    ----------
    seed
        The same seed gives the same pixels, and the same scene at a different resolution for another size.
    size
        Height and width of the image in pixels.

    Raises
    ------
    DataError
        A size out of range, or a negative seed.
    """
    check_size(size)
    # A SeedSequence counts the children that it spawned: without a copy, a second call would give another scene.
    if isinstance(seed, np.random.SeedSequence):
        seed = np.random.SeedSequence(seed.entropy, spawn_key=seed.spawn_key)
    elif seed < 0:
        raise DataError(f"seed must be 0 or more, found {seed}")
    else:
        seed = np.random.SeedSequence(seed)
    layout, truth, light, sketch, grain = seed.spawn(5)

    rng = np.random.default_rng(layout)
    patches = _lay_out(rng)
    polygons = _band_polygons(rng)
    bands = _fill(polygons, size)
    masks = _masks(np.random.default_rng(truth), patches, _fill(polygons, LABEL_GRID))

    octaves = _octaves(grain, size)
    clear = np.ones(size, np.float32)
    wind = rng.uniform(-0.5, 0.5)
    for (name, box), patch_seed in zip(patches, sketch.spawn(len(patches)), strict=True):
        drawn = potential(name, box, wind, np.random.default_rng(patch_seed))
        _cover(clear, drawn, TEXTURES[name], octaves)
    image = _light(np.random.default_rng(light), clear, octaves, polygons)
    image[bands] = 0
    return SyntheticScene(image, masks, bands)


def draw_image(seed: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Draw the image of a scene at any size, (H, W, 3): beyond the limits of `check_size` it is resized."""
    drawn = draw_scene(seed, (min(max(size[0], MIN_SIDE), MAX_SIDE), min(max(size[1], MIN_SIDE), MAX_SIDE)))
    return resize_image(drawn.image, size)


def make_samples(count: int, size: Grid, threads: int = 1) -> NDArray[np.uint8]:
    """Return synthetic images, (count, H, W, 3) uint8: `SCENES` scenes, then shifted, mirrored and darker copies."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        scenes = list(pool.map(lambda seed: draw_image(seed, size), range(min(count, SCENES))))
    images = []
    for number in range(count):
        turn = number // SCENES
        image = np.roll(scenes[number % SCENES], (turn * size[0] // 3, turn * size[1] // 5), (0, 1))
        image = image[:, ::-1] if turn % 2 else image
        # What is subtracted is rounded down, so that only pixels without data are 0.
        images.append(image - (image * (0.12 * (turn % 8))).astype(np.uint8))
    return np.stack(images)


# ---- layout ---------------------------------------------------------------------------------------------------------


def _lay_out(rng: np.random.Generator) -> list[tuple[str, Box]]:
    """Choose the organisations and a patch for each; one may have a second patch. The rest is open ocean."""
    count = 1 + int(rng.choice(len(_CLASS_COUNTS), p=_CLASS_COUNTS))
    weights = np.array([_CLASS_WEIGHTS[name] for name in CLASSES])
    names = [CLASSES[index] for index in rng.choice(len(CLASSES), count, replace=False, p=weights / weights.sum())]
    cells = _cut(rng, count + 1 if count < 4 else count)
    rng.shuffle(names)
    # The additional cell is ocean, or a second patch of the first class.
    if len(cells) > count and rng.random() < 0.35:
        names.append(names[0])
    return [(name, _shrink(rng, box)) for name, box in zip(names, cells, strict=False)]


def _cut(rng: np.random.Generator, count: int) -> list[Box]:
    """Cut the frame into `count` cells by repeatedly cutting the largest across its longer side; largest first."""
    cells: list[Box] = [(0.0, 0.0, 1.0, 1.0)]
    while len(cells) < count:
        left, top, right, bottom = cells.pop(0)
        at = rng.uniform(0.38, 0.62)
        if right - left >= (bottom - top) * ASPECT * rng.uniform(0.7, 1.5):
            middle = left + at * (right - left)
            cells += [(left, top, middle, bottom), (middle, top, right, bottom)]
        else:
            middle = top + at * (bottom - top)
            cells += [(left, top, right, middle), (left, middle, right, bottom)]
        cells.sort(key=lambda box: (box[0] - box[2]) * (box[3] - box[1]))
    return cells


def _shrink(rng: np.random.Generator, box: Box) -> Box:
    """Move each side of a cell inwards by 1% to 12% of the cell's width or height."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    a, b, c, d = rng.uniform(0.01, 0.12, 4)
    return left + a * width, top + b * height, right - c * width, bottom - d * height


def _masks(rng: np.random.Generator, patches: list[tuple[str, Box]], bands: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return simulated boxes of one to three labellers around each patch, minus the bands: (C, 1400, 2100) uint8."""
    masks = np.zeros((len(CLASSES), *LABEL_GRID), np.uint8)
    height, width = LABEL_GRID
    for name, box in patches:
        scale = np.array([box[2] - box[0], box[3] - box[1]] * 2)
        for _ in range(rng.choice((1, 2, 3), p=(0.4, 0.35, 0.25))):
            sides = np.clip(np.array(box) + rng.normal(0.0, 0.06, 4) * scale, 0.0, 1.0)
            left, top, right, bottom = np.rint(sides * (width, height, width, height)).astype(int)
            masks[CLASSES.index(name), top:bottom, left:right] = 1
    masks &= ~bands
    return masks


def _band_polygons(rng: np.random.Generator) -> list[NDArray[np.float64]]:
    """Return outlines of the gaps between swaths, (points, 2) each, as fractions of the frame (x, y).

    A gap is a wedge tilted like the orbit. Sometimes a second gap cuts the lower edge of the frame.
    """
    polygons = []
    if rng.random() < 0.9:
        lean = rng.choice((-1.0, 1.0))
        top, bottom = rng.uniform(0.03, 0.11), rng.uniform(0.09, 0.17)
        middle, shift = rng.uniform(-0.02, 1.02), lean * rng.uniform(0.05, 0.10)
        upper, lower = middle - shift, middle + shift
        polygons.append(
            np.array(
                [(upper - top / 2, 0.0), (upper + top / 2, 0.0), (lower + bottom / 2, 1.0), (lower - bottom / 2, 1.0)]
            )
        )
    if rng.random() < 0.06:
        left, right = rng.uniform(0.86, 1.0, 2)
        polygons.append(np.array([(0.0, left), (1.0, right), (1.0, 1.0), (0.0, 1.0)]))
    return polygons


def _fill(polygons: list[NDArray[np.float64]], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return a mask of `size`, bool, of the area of the polygons."""
    canvas = np.zeros(size, np.uint8)
    for polygon in polygons:
        cv2.fillPoly(canvas, [np.rint(polygon * (size[1], size[0])).astype(np.int32)], 1)
    return canvas.astype(np.bool_)


# ---- rendering: from potentials to pixels ---------------------------------------------------------------------------


def _octaves(seed: np.random.SeedSequence, size: tuple[int, int]) -> dict[int, Floats]:
    """Return the noise pyramid, cells across the width -> octave; without octaves too fine for the image."""
    return {
        cells: noise(np.random.default_rng(child), cells, size)
        for cells, child in zip(_CELLS, seed.spawn(len(_CELLS)), strict=True)
        if cells <= 2 * size[1]
    }


def _cover(clear: Floats, drawn: Floats, texture: Texture, octaves: dict[int, Floats]) -> None:
    """Multiply `clear`, the transmitted light, (H, W) float32, by that of the clouds of one potential, in place."""
    height, width = clear.shape
    reached = np.argwhere(drawn > -1.5)
    if not len(reached):
        return
    (top, left), (bottom, right) = reached.min(0), reached.max(0) + 1
    rows = slice(top * height // PLAN[0], -(-bottom * height // PLAN[0]))
    columns = slice(left * width // PLAN[1], -(-right * width // PLAN[1]))
    total = resize(drawn, clear.shape)[rows, columns]
    for cells, weight in texture.octaves.items():
        if cells in octaves:
            total += weight * octaves[cells][rows, columns]
    total -= texture.low
    total /= texture.high - texture.low
    np.clip(total, 0.0, 1.0, out=total)
    np.subtract(1.0, total, out=total)
    clear[rows, columns] *= 1.0 - texture.opacity * (1.0 - total * total)


def _light(
    rng: np.random.Generator, clear: Floats, octaves: dict[int, Floats], polygons: list[NDArray[np.float64]]
) -> NDArray[np.uint8]:
    """Return the image of ocean, haze and clouds, (H, W, 3) uint8 RGB, without zeros."""
    height, width = clear.shape
    x = np.linspace(0.0, 1.0, width, dtype=np.float32)[None, :]
    y = np.linspace(0.0, 1.0, height, dtype=np.float32)[:, None]

    # Haze and cirrus are smooth and belong to no organisation.
    veil = 0.025 * octaves[8] + rng.uniform(0.01, 0.07)
    if rng.random() < 0.35:
        sheet = octaves[8] + 0.5 * octaves[16] + 0.3 * octaves[32] + 0.15 * octaves[64] + 0.08 * octaves[128]
        veil += rng.uniform(0.06, 0.18) * np.clip(sheet - rng.uniform(0.0, 0.6), 0.0, 2.0)
    # Sun glint is a vertical stripe beside the ground track, sometimes with a bright core.
    if rng.random() < 0.45:
        at, breadth = rng.uniform(0.0, 1.0), rng.uniform(0.05, 0.10)
        glint = rng.uniform(0.08, 0.28) * np.exp(-(((x - at - 0.06 * (y - 0.5)) / breadth) ** 2))
        if rng.random() < 0.35:
            core = rng.uniform(0.2, 0.8)
            glint = glint + 0.5 * np.exp(-(((x - at) / 0.03) ** 2) - ((y - core) / 0.09) ** 2)
        veil += glint
    clear = clear * (1.0 - np.clip(veil, 0.0, 0.8))

    # Brightness varies slowly across a swath, and changes abruptly at the gap to the next orbit.
    drift = 1.0 + rng.uniform(-0.12, 0.12) * (x - 0.5) + rng.uniform(-0.06, 0.06) * (y - 0.5)
    for polygon in polygons[:1]:
        upper, lower = polygon[:2, 0].mean(), polygon[2:, 0].mean()
        drift = np.where(x > upper + (lower - upper) * y, drift * rng.uniform(0.88, 1.12), drift)
    depth = rng.uniform(0.7, 1.3)
    image = np.empty((height, width, 3), np.uint8)
    for channel, (ocean, white) in enumerate(((11.0, 216.0), (16.0, 218.0), (35.0, 219.0))):
        plane = (white - (white - ocean * depth) * clear) * drift
        image[..., channel] = np.clip(plane + 0.5, 1.0, 255.0)
    return image
