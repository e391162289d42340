"""Checks of panoramas against each other and against the days of a store, beyond those of their own position."""

from __future__ import annotations

import datetime
from typing import Protocol

from cloudrt.errors import ImageError
from cloudrt.geo.bounds import Bounds
from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.inference.task import InferTask
from cloudrt.labels import Grid


class Check(Protocol):
    """Decides from the earlier panoramas whether a panorama may be segmented."""

    def check(self, key: str, place: MaskGrid) -> None:
        """Raise ImageError if it may not."""
        ...


class Days:
    """Refuses a panorama of the same day and place as an earlier one, but of another size."""

    def __init__(self) -> None:
        self._sizes: dict[tuple[datetime.date, Bounds], tuple[str, Grid]] = {}

    def check(self, key: str, place: MaskGrid) -> None:
        """Remember a panorama; raise ImageError if it contradicts an earlier one."""
        if place.position is None or place.position.date is None:
            return
        west, south, east, north = (round(side, 2) for side in place.position.bounds(place.grid))
        first, grid = self._sizes.setdefault((place.position.date, (west, south, east, north)), (key, place.grid))
        if grid != place.grid:
            raise ImageError(
                f"covers the same place on the same day as {first}, with a grid of {place.grid[1]}x{place.grid[0]} "
                f"instead of {grid[1]}x{grid[0]}"
            )


def panorama_checks(task: InferTask, classes: tuple[str, ...]) -> list[Check]:
    """Return what panoramas are checked against, in order, besides their own position.

    Raises
    ------
    DataError
        The output is a store of other classes, or a folder that is not a store, which `overwrite` would remove.
    """
    if task.format != "zarr":
        return [Days()] if task.tiling else []
    from cloudrt.geo.store import StoreDays

    if task.overwrite:
        StoreDays(task.output)
        return [StoreDays(None)]
    return [StoreDays(task.output, classes)]
