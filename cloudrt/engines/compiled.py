"""Networks that OpenVINO has compiled, kept for the next start: a large one takes seconds to compile.

One folder an artifact in the user's cache, with the checksum of each file beside it: OpenVINO notices a file that was
cut, but would run one with a flipped bit.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from contextlib import suppress
from pathlib import Path

from cloudrt.system.files import replacing, sha256

logger = logging.getLogger(__name__)

KEPT = 8
"""How many artifacts' folders are kept; the one that was used the longest ago goes first."""
SUFFIX = ".sha256"


def open_folder(content: bytes) -> Path | None:
    """Return the folder for an artifact of these bytes, with sound files alone in it; None where none can be made."""
    from platformdirs import user_cache_path

    folder = user_cache_path("cloudrt") / "openvino" / hashlib.sha256(content).hexdigest()[:24]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.touch()  # used now
        for file in _files(folder):
            seal = file.with_name(file.name + SUFFIX)
            if not seal.is_file() or seal.read_text(encoding="ascii") != sha256(file):
                logger.debug("%s is damaged, or was never finished: it is compiled anew", file)
                file.unlink()
                seal.unlink(missing_ok=True)
        _prune(folder.parent)
    except (OSError, ValueError) as error:
        logger.debug("compiled networks cannot be kept: %s", error)
        return None
    return folder


def seal_folder(folder: Path) -> None:
    """Write the checksums of the files that are new."""
    with suppress(OSError):
        for file in _files(folder):
            seal = file.with_name(file.name + SUFFIX)
            if not seal.exists():
                with replacing(seal, sync=False) as partial:
                    partial.write_text(sha256(file), encoding="ascii")


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.is_file() and file.suffix not in (SUFFIX, ".part")]


def _prune(root: Path) -> None:
    folders = sorted((folder for folder in root.iterdir() if folder.is_dir()), key=lambda one: one.stat().st_mtime)
    for folder in folders[:-KEPT]:
        shutil.rmtree(folder, ignore_errors=True)
