"""Maps of the frequencies of several days, for the report: one picture for each class.

    masks of each panorama -> pixels with the class, and with data, in half-degree cells -> their quotient

The cells of the whole Earth are kept, so that memory does not grow with the number of panoramas. matplotlib is imported
only when the maps are drawn.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloudrt.geo.grid import cell_sums, cells
from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.geo.positions import WGS84
from cloudrt.geo.store import coordinates
from cloudrt.masks.rle import rle_decode
from cloudrt.reports.submission_page import FrequencyPictures

DEGREES = 0.5
"""Side of a cell, in degrees."""
WIDE = 3.0
"""Maps with a larger ratio of width to height are drawn twice as wide."""


class FrequencyMaps:
    """Sums the masks of panoramas in cells.

    Parameters
    ----------
    classes
        Names of the classes.

    Attributes
    ----------
    days
        Dates of the panoramas that were added.
    """

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.classes = classes
        self.days: set[datetime.date] = set()
        rows, columns = round(180 / DEGREES), round(360 / DEGREES)
        self._on = np.zeros((len(classes), rows, columns), np.int64)
        self._known = np.zeros((rows, columns), np.int64)

    def add(self, rle: Mapping[str, str], place: MaskGrid) -> None:
        """Add a panorama; one without a date, or that is not in longitude and latitude (EPSG:4326), is left out.

        Parameters
        ----------
        rle
            Class -> RLE text on the grid of `place`.
        place
            Grid and position.
        """
        position = place.position
        if position is None or position.crs != WGS84 or position.date is None:
            return
        self.days.add(position.date)
        lat, lon = coordinates(place)
        middles, first_row, _ = cells(lat, -90, DEGREES)
        rows = np.clip((middles + 90) // DEGREES, 0, len(self._known) - 1).astype(np.int64)
        middles, first_column, _ = cells(lon, -180, DEGREES)
        columns = ((middles + 180) // DEGREES).astype(np.int64) % self._known.shape[1]
        where = np.ix_(rows, columns)

        def add(total: NDArray[np.int64], pixels: NDArray[np.bool_]) -> None:
            np.add.at(total, where, cell_sums(pixels, first_row, first_column))  # a column may occur twice

        known = rle_decode(place.no_data, place.grid) == 0
        add(self._known, known)
        for index, name in enumerate(self.classes):
            if rle[name]:
                add(self._on[index], known & (rle_decode(rle[name], place.grid) > 0))

    def frequencies(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Return frequencies, (C, H, W) from south to north and NaN without data, and the edges of rows and columns.

        The edges are (H + 1,) latitudes and (W + 1,) longitudes in degrees. Only the smallest box of cells around
        those with data is returned; if it crosses the date line, longitudes continue beyond 180 degrees.
        """
        (rows,) = np.nonzero(self._known.any(axis=1))
        (columns,) = np.nonzero(self._known.any(axis=0))
        gaps = np.diff(columns, append=columns[0] + self._known.shape[1])
        start = (int(np.argmax(gaps)) + 1) % len(columns)  # east of the widest gap
        first, width = int(columns[start]), self._known.shape[1] - int(gaps.max()) + 1
        if width == self._known.shape[1]:
            first = 0
        found = (first + np.arange(width)) % self._known.shape[1]
        some = np.ix_(np.arange(rows[0], rows[-1] + 1), found)
        known = self._known[some]
        on = np.stack([one[some] for one in self._on])
        frequencies = np.divide(on, known, out=np.full(on.shape, np.nan), where=known > 0)
        lat = -90 + DEGREES * np.arange(rows[0], rows[-1] + 2)
        lon = -180 + DEGREES * np.arange(first, first + width + 1)
        return frequencies, np.asarray(lat, np.float64), np.asarray(lon, np.float64)

    def draw(self) -> FrequencyPictures | None:
        """Return a map for each class, all with the same scale; None for fewer than two days, or without data."""
        if len(self.days) < 2 or not self._known.any():
            return None
        frequencies, lat, lon = self.frequencies()
        ratio = (lon[-1] - lon[0]) / (lat[-1] - lat[0])
        highest = max(float(np.nanmax(frequencies)), 0.01)
        found = zip(self.classes, frequencies, strict=True)
        pictures = {name: _draw(values, lat, lon, highest, ratio) for name, values in found}
        return FrequencyPictures(pictures, len(self.days), ratio > WIDE)


def _draw(
    values: NDArray[np.float64], lat: NDArray[np.float64], lon: NDArray[np.float64], highest: float, ratio: float
) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    width = 9.6 if ratio > WIDE else 4.8
    height = min(max(0.86 * width / ratio, 0.13 * width), width) + 0.5
    figure = Figure(figsize=(width, height), dpi=200, layout="constrained")
    panel = figure.subplots()
    panel.set_facecolor("#d5d9e0")  # cells without data
    mesh = panel.pcolormesh(lon, lat, values, vmin=0, vmax=highest, cmap="viridis", rasterized=True)
    bar = figure.colorbar(mesh, ax=panel, pad=0.012, aspect=12, format=PercentFormatter(1, decimals=None))
    bar.ax.tick_params(labelsize=8.5)
    bar.ax.yaxis.set_major_locator(MaxNLocator(3))
    panel.tick_params(labelsize=8.5)
    panel.xaxis.set_major_locator(MaxNLocator(12 if ratio > WIDE else 5, steps=[1, 2, 3, 6, 10]))
    panel.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 3, 5, 10]))
    panel.xaxis.set_major_formatter(_longitude)
    panel.yaxis.set_major_formatter(_latitude)
    FigureCanvasAgg(figure)
    content = BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _longitude(value: float, _position: Any = None) -> str:
    turned = (value + 180) % 360 - 180
    if turned in (0, -180):
        return f"{abs(turned):g}°"
    return f"{abs(turned):g}°{'E' if turned > 0 else 'W'}"


def _latitude(value: float, _position: Any = None) -> str:
    return f"{abs(value):g}°{'N' if value > 0 else 'S' if value < 0 else ''}"
