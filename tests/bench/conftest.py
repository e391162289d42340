"""A model on small grids, and images; modules that need others define fixtures of the same names."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny import SMALL_GRIDS, tiny_artifact, write_jpeg


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("model") / "model.onnx", (64, 96), SMALL_GRIDS, presence=True)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six JPEGs, 420x280 pixels."""
    folder = tmp_path_factory.mktemp("images")
    for seed in range(6):
        write_jpeg(folder / f"{seed}.jpg", seed, (280, 420))
    return folder
