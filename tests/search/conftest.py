"""An artifact without rules, and labelled images on which `cloudrt tune` finds some."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tuning import untuned_model, write_scenes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact."""
    return untuned_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The folder of the images and their labels."""
    root = tmp_path_factory.mktemp("data")
    write_scenes(root, model)
    return root
