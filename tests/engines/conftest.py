"""An artifact, caches and simulated measurements."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.plain import SIZE
from support.plans import simulate_rates
from support.tiny import SMALL_GRIDS, tiny_artifact


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with a presence output, for images of `SIZE`; some modules override this fixture."""
    return tiny_artifact(tmp_path_factory.mktemp("model") / "model.onnx", SIZE, SMALL_GRIDS, presence=True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate cache for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """See `simulate_rates`."""
    return simulate_rates(monkeypatch)
