"""The configuration of the network and its input, without PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Self

from cloudrt.errors import DataError
from cloudrt.labels import CLOUDS, Grid, Labels

IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)
VIEWS: dict[str, tuple[tuple[int, ...], ...]] = {
    "none": ((),),
    "h": ((), (3,)),
    "v": ((), (2,)),
    "hv": ((), (3,), (2,), (2, 3)),
}
"""Test-time augmentation: name -> views; a view is a tuple of the axes of (N, C, H, W) to flip."""
PRESENCES = ("none", "head", "top-k")
MAX_INPUT_PIXELS = 16_000_000
"""About five times the pixels of an image of the competition; larger sizes are probably mistakes."""


@dataclass(frozen=True)
class NetworkConfig:
    """The configuration of the network and its input.

    Parameters
    ----------
    architecture, encoder
        Names in segmentation_models_pytorch, such as "FPN" and "resnet50". An encoder with a colon, such as
        "tu-hf-hub:NAME", is refused: to build it, timm would download its configuration.
    options
        Further arguments of the architecture, such as {"decoder_pyramid_channels": 128}. An FPN also accepts
        "finest_level", the finest level of its pyramid: 2, the default, or 3.
    input_size
        Height and width of the input; multiples of 32.
    mean, std
        Mean and standard deviation of the RGB channels, in levels 0..255: the network's input is (image - mean) / std.
    subtract_no_data
        Whether the probability is set to zero where the image has no data.
    presence
        How the presence of a class in an image is predicted: "none"; "head", a classification head on the encoder;
        "top-k", the mean of the `top_k` highest probabilities of the map.
    top_k
        Number of pixels that "top-k" averages over, of the pixels of the submission grid.
    labels
        Classes and grids.

    Raises
    ------
    DataError
        A value of the wrong type or out of range.
    """

    architecture: str = "FPN"
    encoder: str = "se_resnext101_32x4d"
    options: dict[str, Any] = field(default_factory=dict)
    input_size: Grid = (320, 640)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    subtract_no_data: bool = True
    presence: str = "none"
    top_k: int = 2000
    labels: Labels = CLOUDS

    def __post_init__(self) -> None:
        if not (
            isinstance(self.architecture, str) and isinstance(self.encoder, str) and isinstance(self.options, dict)
        ):
            raise DataError("architecture and encoder must be names, and options a dictionary")
        if ":" in self.encoder:
            raise DataError(f"encoder {self.encoder!r} names a hub or a folder: use a timm name without a colon")
        if len(self.input_size) != 2 or not all(isinstance(side, int) for side in self.input_size):
            raise DataError(f"the input size must be (height, width), two integers, found {self.input_size}")
        height, width = self.input_size
        if any(side < 32 or side % 32 for side in self.input_size):
            near = dict.fromkeys(
                f"{max(32, (width + up) // 32 * 32)}x{max(32, (height + up) // 32 * 32)}" for up in (0, 31)
            )
            raise DataError(
                f"input size {width}x{height}: both sides must be multiples of 32, such as {' or '.join(near)}"
            )
        if height * width > MAX_INPUT_PIXELS:
            raise DataError(f"input size {width}x{height} is more than {MAX_INPUT_PIXELS / 1e6:g} megapixels")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(isinstance(one, int | float) and math.isfinite(one) for one in values):
                raise DataError(f"{name} must be one finite number per channel, found {values}")
        if self.presence not in PRESENCES:
            raise DataError(f"presence must be one of {', '.join(PRESENCES)}, found {self.presence!r}")
        if type(self.subtract_no_data) is not bool:
            raise DataError(f"subtract_no_data must be True or False, found {self.subtract_no_data!r}")
        rows, columns = self.labels.submit_grid
        if self.presence == "top-k" and (type(self.top_k) is not int or not 1 <= self.top_k <= rows * columns):
            raise DataError(f"top_k must be from 1 to the grid's {rows * columns} pixels, found {self.top_k!r}")
        if min(self.std) <= 0:
            raise DataError(f"std must be above 0, found {self.std}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON and checkpoints."""
        return {
            "architecture": self.architecture,
            "encoder": self.encoder,
            "options": dict(self.options),
            "input_size": list(self.input_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "subtract_no_data": self.subtract_no_data,
            "presence": self.presence,
            "top_k": self.top_k,
            "labels": self.labels.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return a configuration from the values that `to_dict` returned; DataError if they are malformed."""
        try:
            return cls(
                **values
                | {name: tuple(values[name]) for name in ("input_size", "mean", "std")}
                | {"labels": Labels.from_dict(values["labels"])}
            )
        except (TypeError, KeyError) as error:
            raise DataError(f"not a valid network configuration: {values}") from error
