"""Compilation of the kernels with numba: in nopython mode, without the GIL, with machine code cached on disk.

The machine code of one version of the kernels is stored in one folder of the user's cache, or of NUMBA_CACHE_DIR if
that is set. Numba's default, a cache beside each source file, would write into the installed package, and would not be
invalidated by a change of a function that the kernel imports from another file.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import llvmlite
import numba
import numba.extending
import numpy as np

from cloudrt.system.cache import open_entry, remove_damaged, seal

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile `function` in nopython mode on its first call; later processes load the machine code from the cache.

    If the cache cannot be written, each process compiles the kernels, which takes a few seconds.
    """
    folder = _cache_folder()
    if folder is None:
        return cast(F, numba.njit(nogil=True)(function))
    config: Any = numba.config
    previous = config.CACHE_DIR
    config.CACHE_DIR = str(folder)
    try:
        compiled = numba.njit(nogil=True, cache=True)(function)
    finally:
        config.CACHE_DIR = previous
    _seal_saved_files(compiled, function)
    return cast(F, compiled)


def _seal_saved_files(compiled: Any, function: Callable[..., Any]) -> None:
    """Make numba write a checksum for each file that it caches for a function, and ignore errors such as a full disk.

    Numba has no public hook for this: `Dispatcher._cache` is private. Written against numba 0.68, whose
    `Dispatcher.compile` calls `_cache.save_overload(signature, result)` and does not catch OSError.
    """
    folder, code = Path(compiled.stats.cache_path), function.__code__
    files = f"{Path(code.co_filename).stem}.{function.__qualname__}-{code.co_firstlineno}.py*.nb[ci]"
    save = compiled._cache.save_overload

    def save_and_seal(signature: Any, result: Any) -> None:
        with suppress(OSError):
            save(signature, result)
            seal(folder.glob(files))

    compiled._cache.save_overload = save_and_seal


@cache
def _cache_folder() -> Path | None:
    """Return the cache folder of these kernels, after removing damaged files; None if it is not writable."""
    config: Any = numba.config
    given = config.CACHE_DIR  # NUMBA_CACHE_DIR
    folder = open_entry("kernels", _fingerprint(), Path(given, "cloudrt-kernels").absolute() if given else None)
    if folder is None:
        return None
    try:
        remove_damaged(folder.rglob("*.nb[ci]"))
        # Numba creates a folder per source folder; if it cannot write there, it uses the package's own folder.
        for written in folder.iterdir():
            tempfile.TemporaryFile(dir=written).close()
    except OSError:
        return None
    return folder


def _fingerprint() -> str:
    """Return a digest of the kernels' source and of the library versions that the machine code depends on."""
    digest = hashlib.sha256(f"{sys.version} {numba.__version__} {llvmlite.__version__} {np.__version__}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def intrinsic(function: Callable[..., Any]) -> Any:
    """Define, by LLVM instructions, a function that kernels can call; see `numba.extending.intrinsic`."""
    return numba.extending.intrinsic(function)
