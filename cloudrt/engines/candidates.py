"""Candidates for a plan: a provider with its settings, which the user fixes or which are measured."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from cloudrt.engines.base import BATCH_SIZES
from cloudrt.options import RunOptions

GAIN = 1.05
"""Factor by which a setting must be faster to be preferred to one that was measured before it."""


@dataclass(frozen=True)
class Setting:
    """Settings of an engine, and the images/s measured with them; see `EngineOptions`."""

    batch_size: int
    streams: int = 1
    cuda_graph: bool = False
    images_per_s: float = 0.0
    channels_last: bool = False
    pinned: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)

    @classmethod
    def read(cls, values: Any) -> list[Setting]:
        """Return settings from a list of the values that `to_dict` returned; an empty list if it is malformed."""
        try:
            settings = [cls(**one) for one in values]
        except TypeError:
            return []
        kinds = (int, int, bool, float, bool, bool)
        for setting in settings:
            found = tuple(map(type, asdict(setting).values()))
            if (
                found != kinds
                or min(setting.batch_size, setting.streams) < 1
                or not 0 < setting.images_per_s < math.inf
            ):
                return []
        return settings


@dataclass(frozen=True)
class FixedSettings:
    """The settings that are fixed; the others, which are 0 or None, are measured."""

    batch_size: int = 0
    streams: int = 0
    cuda_graph: bool | None = None
    channels_last: bool | None = None


NOTHING_FIXED = FixedSettings()


def fixed_settings(options: RunOptions, provider: str) -> FixedSettings:
    """Return the settings that are not measured: the options or the provider fix them.

    ONNX Runtime's CPU provider and CUDA graphs have one stream, and CPU providers no graph. TensorRT's batch size is
    never measured, because an engine is built for each size.
    """
    size = options.batch_size or (BATCH_SIZES["tensorrt"] if provider == "tensorrt" else 0)
    if provider == "cpu":
        return FixedSettings(size, 1, False)
    if provider == "remote":
        return FixedSettings(size, options.remote.streams, False)
    if provider == "openvino":
        return FixedSettings(size, options.openvino.streams, False)
    if provider == "cuda":
        chosen = options.cuda
        return FixedSettings(size, 1 if chosen.graph else chosen.streams, chosen.graph, chosen.channels_last)
    other = options.tensorrt if provider == "tensorrt" else options.tensorrt_rtx
    return FixedSettings(size, 1 if other.graph else other.streams, other.graph)


@dataclass(frozen=True)
class Candidate:
    """A provider with its settings."""

    provider: str
    precision: str
    setting: Setting

    def describe(self) -> str:
        """Return the provider and its settings as text, such as "provider cuda, batch 32, 2 streams"."""
        setting = self.setting
        words = [f"provider {self.provider}", f"batch {setting.batch_size}"]
        words += [f"{setting.streams} streams"] if setting.streams > 1 else []
        words += [f"computing in {self.precision}"] if self.provider == "openvino" else []
        words += ["channels last"] if setting.channels_last else []
        words += ["CUDA graph"] if setting.cuda_graph else []
        words += [] if setting.pinned else ["copies by ONNX Runtime"]
        return ", ".join(words)


def best_setting(settings: list[Setting]) -> Setting | None:
    """Return the first settings whose rate is within a factor `GAIN` of the highest; None for an empty list."""
    if not settings:
        return None
    fastest = max(setting.images_per_s for setting in settings)
    return next(setting for setting in settings if GAIN * setting.images_per_s >= fastest)
