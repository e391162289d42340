"""The model of `support.placed`; modules that need another one define their own fixture `model`."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.placed import placed_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return placed_model(tmp_path_factory.mktemp("model"))
