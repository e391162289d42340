"""One file per way to run an artifact; `open_engine` picks by the provider's name."""

from __future__ import annotations

from cloudrt.engines.base import (
    BATCH_SIZES,
    PROVIDERS,
    Choice,
    Engine,
    EngineOptions,
    choose_provider,
    open_engine,
)

__all__ = ["BATCH_SIZES", "PROVIDERS", "Choice", "Engine", "EngineOptions", "choose_provider", "open_engine"]
