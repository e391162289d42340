"""Caches and simulated measurements."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.plans import simulate_rates


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate cache for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """See `simulate_rates`."""
    return simulate_rates(monkeypatch)
