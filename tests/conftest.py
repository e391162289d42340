"""What every test has: a cache folder of its own run, so that nothing measured before decides."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from platformdirs import user_cache_path


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what `auto` measures in a folder that is dropped; numba's compiled kernels have their own."""
    kernels = os.environ.get("NUMBA_CACHE_DIR") or str(user_cache_path("cloudrt"))
    folder: Path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("NUMBA_CACHE_DIR", kernels)
        yield
