"""What every test has: a cache folder of its own run, so that nothing measured before decides."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from platformdirs import user_cache_path

from cloudrt.system.machine import usable_cpus

if TYPE_CHECKING:
    from cloudrt.export.source import ExportSource

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # torch's threads of all of them share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus() // workers)))


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what `auto` measures in a folder that is dropped; numba's compiled kernels have their own."""
    kernels = os.environ.get("NUMBA_CACHE_DIR") or str(user_cache_path("cloudrt"))
    folder: Path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("NUMBA_CACHE_DIR", kernels)
        yield


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of twelve labelled scenes and four to predict."""
    from cloudrt.data.synth import write_dataset

    folder = tmp_path_factory.mktemp("scenes") / "data"
    write_dataset(folder, 16, (140, 210), seed=3)
    return folder


@pytest.fixture(scope="session")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where training keeps what it has decoded of `scenes`."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained FPN with a ResNet-18."""
    from support.networks import make_checkpoint

    path = tmp_path_factory.mktemp("checkpoint") / "best.pth"
    make_checkpoint(path)
    return path


@pytest.fixture(scope="session")
def source(checkpoint: Path) -> ExportSource:
    """What is exported of it."""
    from cloudrt.export.source import ExportSource, SourceOptions

    made = ExportSource(checkpoint, SourceOptions(calibrate=True))
    made.run_pytorch()
    return made
