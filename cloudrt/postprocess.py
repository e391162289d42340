"""From a probability map to the RLE text of one class: threshold, 8-connected components, area filter, runs.

The network's output arrives as uint8 levels 0..255 in the transposed layout (W, H), so that memory order is RLE order
and a run is a stretch of memory. `Rule` holds the few integers that decide a class; training and `cloudrt tune` find
them, checkpoint and artifact carry them, `apply_rules` applies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cloudrt.errors import DataError

# The kernels are imported where they are called: `import cloudrt` loads this module, and must not wait for numba.


@dataclass(frozen=True)
class Rule:
    """What decides the mask of one class; levels are 0..255, areas are pixels of the submission grid.

    The class is empty where its `presence` output is below `presence`, or where fewer than `gate_pixels` pixels
    exceed `gate_threshold`. Otherwise a pixel is on when its level is greater than `threshold`, and an 8-connected
    component stays when its area is greater than `min_area`.
    """

    threshold: int
    min_area: int
    gate_threshold: int = 255
    gate_pixels: int = 0
    presence: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise DataError(f"Rule.{name} is a whole number, found {value!r}")
            limit = 255 if name in ("threshold", "gate_threshold", "presence") else 2**31 - 1
            if not 0 <= value <= limit:
                raise DataError(f"Rule.{name} is within 0..{limit}, found {value}")

    def to_dict(self) -> dict[str, int]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        try:
            return cls(**values)
        except TypeError as error:
            raise DataError(f"not a Rule: {values}") from error


def postprocess(probability: NDArray[Any], threshold: float, min_area: int) -> str:
    """Return the RLE text of the components of `probability > threshold` that are larger than `min_area` pixels.

    Parameters
    ----------
    probability
        (H, W): float32 in 0..1, or uint8 with a threshold of 0..255. A Fortran-ordered array, such as the transpose of
        the artifact's (W, H) output, is read as it lies.
    threshold
        A pixel is on when its probability is greater.
    min_area
        A component, 8-connected, stays when its area in pixels is greater.

    Raises
    ------
    DataError
        Another shape or dtype.
    """
    if probability.ndim != 2:
        raise DataError(f"a probability map is (H, W), found an array of shape {probability.shape}")
    if probability.dtype == np.uint8 and 0 <= threshold <= 255 and int(threshold) == threshold:
        return encode_columns(np.ascontiguousarray(probability.T), int(threshold), min_area)
    if probability.dtype not in (np.uint8, np.float32):
        raise DataError(f"a probability map is float32 in 0..1 or uint8 in 0..255, found {probability.dtype}")
    return encode_columns(np.ascontiguousarray(threshold < probability.T).view(np.uint8), 0, min_area)


def encode_columns(levels: NDArray[np.uint8], threshold: int, min_area: int) -> str:
    """Return the RLE text of a map in RLE order: `levels` is (W, H) uint8, C-contiguous."""
    width, height = levels.shape
    if not levels.size:
        return ""
    runs = Runs(width, height)
    if not runs.find(levels, threshold):
        return ""
    return runs.text(min_area)


class Runs:
    """The runs and components of one (W, H) map, in buffers that are used again for the next map of that size."""

    def __init__(self, width: int, height: int) -> None:
        most = width * ((height + 1) // 2)
        self.height = height
        self.count = 0
        self.starts = np.empty(most, np.int32)
        self.stops = np.empty(most, np.int32)
        self.first = np.empty(width + 1, np.int32)
        self.parent = np.empty(most, np.int32)
        self.area = np.empty(most, np.int64)
        self._digits = len(str(width * height)) + 1

    def find(self, levels: NDArray[np.uint8], threshold: int) -> int:
        """Find the runs above `threshold` and join them into components; return how many runs there are."""
        from cloudrt.kernels import runs as kernels

        self.count = kernels.find_runs(levels, threshold, self.starts, self.stops, self.first)
        if self.count:
            kernels.join_runs(self.starts, self.stops, self.first, self.parent, self.area)
        return self.count

    def text(self, min_area: int) -> str:
        """Return the RLE text of the components larger than `min_area` pixels."""
        from cloudrt.kernels import runs as kernels

        text = np.empty(2 * self._digits * self.count, np.uint8)
        length = kernels.write_runs(
            self.starts, self.stops, self.first, self.parent, self.area, min_area, self.height, text
        )
        return text[:length].tobytes().decode("ascii")

    def component_overlaps(self, truth_sums: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the area and the true pixels of each component.

        `truth_sums` is (W, H + 1): at [x, y] the number of true pixels of column x above row y.
        """
        from cloudrt.kernels import runs as kernels

        overlap = np.empty(self.count, np.int64)
        kernels.component_overlaps(self.starts, self.stops, self.first, self.parent, truth_sums, overlap)
        roots = np.flatnonzero(self.parent[: self.count] == np.arange(self.count))
        return self.area[roots], overlap[roots]


def apply_rules(
    levels: NDArray[np.uint8], rules: Sequence[Rule], presence: NDArray[np.uint8] | None = None
) -> list[str]:
    """Return one RLE text a class for one image.

    Parameters
    ----------
    levels
        (C, W, H) uint8, C-contiguous: one image of the artifact's `probability` output.
    rules
        One a class.
    presence
        (C,) uint8: the artifact's `presence` output, where it has one.

    Raises
    ------
    DataError
        Maps, rules and presence that do not number the same.
    """
    from cloudrt.kernels import runs as kernels

    if levels.ndim != 3 or len(levels) != len(rules) or (presence is not None and presence.shape != (len(rules),)):
        found = f"{levels.shape} maps, {len(rules)} rules, presence {None if presence is None else presence.shape}"
        raise DataError(f"an image has one (W, H) map, one rule and one presence a class, found {found}")
    texts = []
    for index, rule in enumerate(rules):
        empty = presence is not None and presence[index] < rule.presence
        if not empty and rule.gate_pixels:
            empty = kernels.count_above(levels[index], rule.gate_threshold) < rule.gate_pixels
        texts.append("" if empty else encode_columns(levels[index], rule.threshold, rule.min_area))
    return texts
