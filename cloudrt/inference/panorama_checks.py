"""Checks of each panorama against the earlier panoramas and against the days of an existing store."""

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
    """Return the checks that each panorama of a task must pass, in order.

    Raises
    ------
    DataError
        The output exists and is not a store (`overwrite` does not remove it), or, without `overwrite`, is a store of
        other classes.
    """
    if task.format != "zarr":
        return [Days()] if task.tiling else []
    from cloudrt.geo.store import StoreDays

    if task.overwrite:
        StoreDays(task.output)
        return [StoreDays(None)]
    return [StoreDays(task.output, classes)]
