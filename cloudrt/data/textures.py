"""Potentials and textures of the four cloud organisations, which `cloudrt.data.scenes` renders.

A potential is the local tendency to form clouds. It is drawn from geometric shapes on a small grid of fixed size (the
plan): skeletons with ribs for Fish, clumps for Flower, arcs for Gravel, veins for Sugar. A smooth displacement then
distorts the shapes. A texture defines how noise and a soft threshold turn a potential into opacity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.labels import LABEL_GRID

Floats = NDArray[np.float32]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in fractions of the frame's width and height."""

PLAN = (400, 600)
"""Height and width of the grid that potentials are drawn on."""

ASPECT = LABEL_GRID[0] / LABEL_GRID[1]


@dataclass(frozen=True)
class Texture:
    """Conversion of a potential into opacity.

    Parameters
    ----------
    octaves
        Cells across the width -> weight of this octave of noise.
    low, high
        Potential plus noise at which opacity starts to rise, and at which it is largest.
    opacity
        Largest opacity, 0 to 1.
    """

    octaves: dict[int, float]
    low: float
    high: float
    opacity: float


TEXTURES = {
    "Fish": Texture({32: 0.08, 64: 0.14, 128: 0.19, 256: 0.17, 512: 0.11, 1024: 0.05}, 0.42, 1.50, 0.95),
    "Flower": Texture({32: 0.06, 64: 0.13, 128: 0.17, 256: 0.10, 512: 0.07, 1024: 0.04}, 0.30, 1.20, 0.95),
    "Gravel": Texture({32: 0.08, 64: 0.14, 128: 0.30, 256: 0.20, 512: 0.10, 1024: 0.05}, 0.80, 1.75, 0.92),
    "Sugar": Texture({32: 0.10, 256: 0.18, 512: 0.30, 1024: 0.20}, 0.68, 1.70, 0.80),
}


def potential(name: str, box: Box, wind: float, rng: np.random.Generator) -> Floats:
    """Draw the potential of one patch.

    Parameters
    ----------
    name
        The organisation.
    box
        Position of the patch.
    wind
        Direction of the wind in radians from the horizontal; streaks and skeletons follow it.
    rng
        Random generator of this patch.

    Returns
    -------
    numpy.ndarray
        `PLAN` float32: about 1 in the centre of a cloud, 0 in gaps, well below 0 outside the patch.
    """
    shapes = {"Fish": _fish, "Flower": _flower, "Gravel": _gravel, "Sugar": _sugar}[name]
    x, y = _plan_axes()
    bend = 0.012 * PLAN[1]
    warp_x, warp_y = (np.add(axis, bend * noise(rng, 10, PLAN), dtype=np.float32) for axis in (x, y))
    drawn = shapes(box, wind, rng) + _inside(box)
    distorted = cv2.remap(drawn, warp_x, warp_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(distorted, np.float32)


def _fish(box: Box, wind: float, rng: np.random.Generator) -> Floats:
    """Draw long skeletons: a thick spine with ribs on both sides, and wide gaps of clear ocean between skeletons."""
    left, top, right, bottom = _plan_box(box)
    width, height = right - left, bottom - top
    spines = np.full(PLAN, 255, np.uint8)
    ribs = np.full(PLAN, 255, np.uint8)
    count = max(1, round(height / (0.17 * PLAN[1])))
    tilt = math.tan(wind) * min(1.0, 0.5 * height / width)
    steps = np.linspace(-0.5, 0.5, 24)
    for index in range(count):
        x = left + width * (0.5 + steps * rng.uniform(0.85, 1.0))
        y = top + height * (index + 0.5 + rng.uniform(-0.12, 0.12)) / count + tilt * steps * width
        y += height / count * 0.12 * np.sin(steps * rng.uniform(4.0, 8.0) + rng.uniform(0.0, 6.0))
        cv2.polylines(spines, [np.rint(np.stack([x, y], 1)).astype(np.int32)], False, 0, 1)
        for at in rng.uniform(0, len(x) - 1, int(60 * width / PLAN[1]) + 4):
            foot = np.array([np.interp(at, range(len(x)), x), np.interp(at, range(len(y)), y)])
            angle = wind + rng.choice((-1, 1)) * rng.uniform(0.5, 1.1)
            tip = foot + rng.uniform(0.02, 0.075) * PLAN[1] * np.array([np.cos(angle), np.sin(angle)])
            cv2.line(ribs, np.rint(foot).astype(int).tolist(), np.rint(tip).astype(int).tolist(), 0, 1)
    spine = np.exp(-((_distance(spines) / (0.019 * PLAN[1])) ** 2))
    rib = np.exp(-((_distance(ribs) / (0.006 * PLAN[1])) ** 2))
    return np.asarray(np.maximum(1.15 * spine, 0.85 * rib), np.float32)


def _flower(box: Box, wind: float, rng: np.random.Generator) -> Floats:
    """Draw large stratiform clumps on a jittered hexagonal grid, with clear air between them."""
    left, top, right, bottom = _plan_box(box)
    columns, rows = _plan_axes()
    wanted = np.full(PLAN, -0.6, np.float32)
    pitch = 0.125 * PLAN[1]
    for row, y in enumerate(np.arange(top + pitch / 2, bottom, pitch * 0.9)):
        for x in np.arange(left + pitch * (0.5 + 0.5 * (row % 2)), right, pitch):
            centre_x, centre_y = x + rng.uniform(-0.22, 0.22) * pitch, y + rng.uniform(-0.22, 0.22) * pitch
            radius, stretch = pitch * rng.uniform(0.28, 0.50), rng.uniform(0.85, 1.2)
            # A clump is negligible beyond 2.5 radii: draw it in that window only.
            reach = 2.5 * radius
            window = (
                slice(max(0, int(centre_y - reach)), int(centre_y + reach) + 1),
                slice(max(0, int(centre_x - reach)), int(centre_x + reach) + 1),
            )
            distance = np.hypot((columns[:, window[1]] - centre_x) / stretch, (rows[window[0]] - centre_y) * stretch)
            np.maximum(wanted[window], 1.3 - distance / radius, out=wanted[window], casting="same_kind")
    return np.minimum(wanted, 0.85)


def _gravel(box: Box, wind: float, rng: np.random.Generator) -> Floats:
    """Draw grains along the arcs of cold pools."""
    left, top, right, bottom = _plan_box(box)
    arcs = np.full(PLAN, 255, np.uint8)
    for _ in range(int((right - left) * (bottom - top) / (0.05 * PLAN[1]) ** 2)):
        centre = (round(rng.uniform(left, right)), round(rng.uniform(top, bottom)))
        radius = rng.uniform(0.025, 0.06) * PLAN[1]
        axes = (round(radius), round(radius * rng.uniform(0.7, 1.0)))
        start = rng.uniform(0, 360)
        cv2.ellipse(arcs, centre, axes, 0.0, start, start + rng.uniform(80, 220), 0, 1)
    near = np.exp(-((_distance(arcs) / (0.006 * PLAN[1])) ** 2))
    return np.asarray(0.22 + 0.78 * near, np.float32)


def _sugar(box: Box, wind: float, rng: np.random.Generator) -> Floats:
    """Draw fine specks, concentrated in thin veins along the wind."""
    columns, rows = _plan_axes()
    cosine, sine = math.cos(wind), math.sin(wind)
    along, across = columns * cosine + rows * sine, rows * cosine - columns * sine
    wanted = np.full(PLAN, 0.08, np.float32)
    # Sampling noise at coordinates compressed along the wind stretches it in that direction; its zeros are the veins.
    for cells, weight in ((60, 0.35), (150, 0.75)):
        x, y = 0.2 * along + 0.3 * PLAN[1], 0.8 * across + 0.3 * PLAN[0]
        veins = cv2.remap(noise(rng, cells, PLAN), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        wanted += weight * np.exp(-((veins / 0.22) ** 2))
    return wanted


def _inside(box: Box) -> Floats:
    """Return 0 for the plan's pixels inside the patch, decreasing to -3 across its edge: `PLAN` float32."""
    left, top, right, bottom = _plan_box(box)
    x, y = _plan_axes()
    depth = np.minimum(np.minimum(x - left, right - x), np.minimum(y - top, bottom - y))
    return np.asarray(np.clip(depth / (0.02 * PLAN[1]) - 0.3, -3.0, 0.0), np.float32)


def _plan_box(box: Box) -> Box:
    height, width = PLAN
    return box[0] * width, box[1] * height, box[2] * width, box[3] * height


def _plan_axes() -> tuple[Floats, Floats]:
    """Return x of the plan's columns, (1, W), and y of its rows, (H, 1), float32."""
    return np.arange(PLAN[1], dtype=np.float32)[None, :], np.arange(PLAN[0], dtype=np.float32)[:, None]


def _distance(drawn: NDArray[np.uint8]) -> Floats:
    """Return the distance of each pixel to the nearest zero, in pixels of the plan."""
    return np.asarray(cv2.distanceTransform(drawn, cv2.DIST_L2, cv2.DIST_MASK_PRECISE), np.float32)


def noise(rng: np.random.Generator, cells: int, size: tuple[int, int]) -> Floats:
    """Return smooth noise, `size` float32, from normal values of mean 0 on `cells` cells across the width.

    The number of random draws does not depend on `size`.
    """
    grid = rng.standard_normal((max(2, round(cells * ASPECT)), cells), np.float32)
    return resize(grid, size)


def resize(field: Floats, size: tuple[int, int]) -> Floats:
    """Resize a field to `size`, float32: bicubic enlargement, or area averages, which avoid aliasing."""
    grows = field.shape[1] < size[1]
    interpolation = cv2.INTER_CUBIC if grows else cv2.INTER_AREA
    return np.asarray(cv2.resize(field, size[::-1], interpolation=interpolation), np.float32)
