"""Folders that tests read, and what setup.cfg says."""

from __future__ import annotations

from collections.abc import Mapping
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository."""
GOLDEN = ROOT / "tests" / "golden"
"""Files of earlier formats; see its README.md."""
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
"""The README and the pages of the docs."""


def setup_config() -> ConfigParser:
    """Return setup.cfg."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def setup_metadata() -> Mapping[str, str]:
    """Return the fields of [metadata] in setup.cfg."""
    return setup_config()["metadata"]


def setup_entry_points() -> dict[str, str]:
    """Return name -> function of the commands in setup.cfg."""
    lines = setup_config()["options.entry_points"]["console_scripts"].split("\n")
    return {name.strip(): target.strip() for name, _, target in (line.partition("=") for line in lines if line)}
