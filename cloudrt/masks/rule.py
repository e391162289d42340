"""The post-processing parameters of one class, and their conversion to and from a dictionary.

Training and `cloudrt tune` search them, the checkpoint and the artifact store them as JSON, and
`cloudrt.masks.postprocess` applies them to the network's output.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from cloudrt.errors import DataError


@dataclass(frozen=True)
class Rule:
    """The post-processing parameters of one class.

    The mask is empty if the `presence` output is below `presence`, or if fewer than `gate_pixels` pixels exceed
    `gate_threshold`. Otherwise a pixel is on if its level is greater than `threshold`, and an 8-connected component
    is kept if its area is greater than `min_area`.

    Parameters
    ----------
    threshold, gate_threshold, presence
        Levels, 0..255.
    min_area, gate_pixels
        Pixels of the submission grid.

    Raises
    ------
    DataError
        A value that is not an integer or out of range.
    """

    threshold: int
    min_area: int
    gate_threshold: int = 255
    gate_pixels: int = 0
    presence: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise DataError(f"Rule.{name} must be a whole number, found {value!r}")
            limit = 255 if name in ("threshold", "gate_threshold", "presence") else 2**31 - 1
            if not 0 <= value <= limit:
                raise DataError(f"Rule.{name} must be within 0..{limit}, found {value}")

    def to_dict(self) -> dict[str, int]:
        """Return plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return a rule from the values that `to_dict` returned; names that have a default may be missing.

        Raises
        ------
        DataError
            Another missing name, an unknown name, or an invalid value.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise DataError(f"not a Rule with {', '.join(f.name for f in fields(cls))}: {values}") from error
