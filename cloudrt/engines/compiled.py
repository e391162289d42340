"""The networks that OpenVINO has compiled, cached for the next start: a large one takes seconds to compile.

One folder per artifact, with sealed files: OpenVINO notices a file that was cut, but would run one with a flipped bit.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from cloudrt.system.cache import SEAL, open_entry, remove_damaged, seal

logger = logging.getLogger(__name__)


def open_folder(content: bytes) -> Path | None:
    """Return the cache folder for an artifact of these bytes, damaged files removed; None where it is unwritable."""
    folder = open_entry("openvino", hashlib.sha256(content).hexdigest()[:24])
    if folder is None:
        return None
    try:
        remove_damaged(_files(folder))
    except OSError as error:
        logger.debug("compiled networks are not cached: %s", error)
        return None
    return folder


def seal_folder(folder: Path) -> None:
    """Seal the files that are new."""
    seal(file for file in _files(folder) if not file.with_name(file.name + SEAL).exists())


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.is_file() and file.suffix not in (SEAL, ".part")]
