"""The version of cloudrt and of installed packages."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distributions, version

VERSION = "0.1.0"

OPENCV = ("opencv-python-headless", "opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless")
"""The distributions that install the module `cv2`."""


def install_command(extras: str, *options: str) -> str:
    """Return how to install extras of cloudrt, such as "cuda,tensorrt"; cloudrt is not on the package index yet."""
    return f"{' '.join(['pip install', *options])} '.[{extras}]' in the checkout of cloudrt"


def package_version(*names: str) -> str:
    """Return the version of the first installed distribution in `names`, or "" if none is installed."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def package_versions(*names: str) -> dict[str, str]:
    """Return name -> version of the distributions in `names` that are installed."""
    found = {name: package_version(name) for name in names}
    return {name: one for name, one in found.items() if one}


def installed_distributions() -> dict[str, str]:
    """Return name -> version of all installed distributions; names are normalised, such as "onnxruntime-gpu"."""
    found: dict[str, str] = {}
    for distribution in distributions():
        name = distribution.metadata["Name"]
        if name:  # a package that was removed incompletely has none
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return found
