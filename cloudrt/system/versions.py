"""The version of cloudrt, and those of the packages that are installed."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distributions, version

VERSION = "0.1.0"


def package_version(*names: str) -> str:
    """Return the version of the first of these distributions that is installed; "" where none is."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def package_versions(*names: str) -> dict[str, str]:
    """Return distribution -> version of those that are installed."""
    found = {name: package_version(name) for name in names}
    return {name: one for name, one in found.items() if one}


def installed_distributions() -> dict[str, str]:
    """Return distribution -> version, names in lower case with dashes, of all that is installed."""
    found: dict[str, str] = {}
    for distribution in distributions():
        name = distribution.metadata["Name"]
        if name:  # a half-removed package has none
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return found
