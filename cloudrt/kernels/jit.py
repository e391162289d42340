"""The one place that says how cloudrt's loops are compiled: without Python objects, without the GIL, cached on disk.

The machine code is kept in the user's cache folder, in one folder a version of the kernels: numba's own cache would not
notice that a kernel's callee in another file has changed, and would want to write into the installed package.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numba.extending
from platformdirs import user_cache_path

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile `function` on first call; later processes load what was compiled.

    NUMBA_CACHE_DIR, where it is set, takes the place of the user's cache folder. Where nothing can be written numba
    refuses to cache; then every process compiles anew, in a few seconds.
    """
    config: Any = numba.config
    theirs = config.CACHE_DIR
    config.CACHE_DIR = str(Path(theirs or user_cache_path("cloudrt")) / f"kernels-{_fingerprint()}")
    try:
        compiled = numba.njit(nogil=True, cache=True)(function)
        _forgive(compiled)
        return cast(F, compiled)
    except RuntimeError:  # what numba raises where no folder can be written
        return cast(F, numba.njit(nogil=True)(function))
    finally:
        config.CACHE_DIR = theirs


def _forgive(compiled: Any) -> None:
    """Compile anew where cached machine code is damaged, by a power cut, say, or cannot be kept: numba would raise."""
    cache = compiled._cache
    load = cache.load_overload

    def load_overload(signature: Any, context: Any) -> Any:
        try:
            return load(signature, context)
        except (EOFError, ValueError, TypeError, AttributeError, IndexError, pickle.UnpicklingError):
            cache.flush()
            return None

    save = cache.save_overload

    def save_overload(signature: Any, data: Any) -> None:
        with suppress(OSError):  # a full disk: the next process compiles anew
            save(signature, data)

    cache.load_overload, cache.save_overload = load_overload, save_overload


def intrinsic(function: Callable[..., Any]) -> Any:
    """Make a function of the kernels from LLVM instructions; see `numba.extending.intrinsic`."""
    return numba.extending.intrinsic(function)


@cache
def _fingerprint() -> str:
    """Return a name that changes with any of the kernels' source."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
