"""Shows the version of cloudrt at the foot of every page."""

from __future__ import annotations

from typing import Any

from cloudrt.system.versions import VERSION


def on_config(config: Any) -> Any:
    """Set the line at the foot of the pages."""
    config.copyright = f"cloudrt {VERSION}"
    return config
