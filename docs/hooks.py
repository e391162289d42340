"""Shows the version of cloudrt at the foot of every page, and links to the repository that setup.cfg names."""

from __future__ import annotations

from configparser import ConfigParser
from pathlib import Path
from typing import Any

from cloudrt.system.versions import VERSION


def on_config(config: Any) -> Any:
    """Set the link at the head of the pages, and the line at their foot."""
    metadata = ConfigParser()
    metadata.read(Path(config.config_file_path).parent / "setup.cfg", encoding="utf-8")
    home = metadata["metadata"]["url"]
    config.repo_url, config.repo_name = home, "cloudrt"
    config.copyright = f'cloudrt {VERSION} · <a href="{home}">repository</a>'
    return config
