"""The one place that says how cloudrt's loops are compiled: without Python objects, without the GIL, cached on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile `function` on first call; keep the machine code beside the package or in the user's cache.

    Where neither is writable (a read-only container) numba refuses to cache; then every process compiles anew.
    """
    try:
        return cast(F, numba.njit(nogil=True, cache=True)(function))
    except RuntimeError:
        return cast(F, numba.njit(nogil=True)(function))
