"""Cache of the networks that OpenVINO compiled; a large network takes seconds to compile.

Each artifact has a folder per batch size, and each file a stored checksum: OpenVINO detects truncated files, but not
changed bits.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from cloudrt.system.cache import SEAL, open_entry, remove_damaged, seal

logger = logging.getLogger(__name__)


def open_folder(content: bytes) -> Path | None:
    """Return the cache folder of a network, after removing damaged files; None if it is not writable.

    `content` is the serialised model that OpenVINO compiles, with its batch size.
    """
    folder = open_entry("openvino", hashlib.sha256(content).hexdigest()[:24])
    if folder is None:
        return None
    try:
        remove_damaged(_files(folder))
    except OSError as error:
        logger.debug("cannot cache compiled networks: %s", error)
        return None
    return folder


def seal_folder(folder: Path) -> None:
    """Store the checksums of the new files of a cache folder, unless another process has removed it."""
    try:
        seal(file for file in _files(folder) if not file.with_name(file.name + SEAL).exists())
    except OSError as error:
        logger.debug("cannot cache compiled networks: %s", error)


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.is_file() and file.suffix not in (SEAL, ".part")]
