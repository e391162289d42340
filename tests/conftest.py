"""Fixtures that several folders share; and caches, so that tests neither read nor write the user's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from cloudrt.system.machine import usable_cpus

if TYPE_CHECKING:
    from cloudrt.export.source import ExportSource


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before test modules import what reads it."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    settings.register_profile("untimed", deadline=None)  # a busy machine is not a failure
    settings.load_profile("untimed")
    if cache := getattr(config, "cache", None):  # absent with -p no:cacheprovider
        for name in ("NUMBA_CACHE_DIR", "MPLCONFIGDIR"):  # compiled kernels and font lists, for later runs too
            os.environ.setdefault(name, str(cache.mkdir(name.lower())))
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # the processes share the cores
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus() // workers)))


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty cache folder for each run, so that no earlier measurements are used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of twelve labelled scenes and four of the test set."""
    from cloudrt.data.synth import write_dataset

    folder = tmp_path_factory.mktemp("scenes") / "data"
    write_dataset(folder, 16, (140, 210), seed=3)
    return folder


@pytest.fixture(scope="session")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the dataset caches of `scenes`, shared so that they are written once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny artifact for images of 96x64 pixels, with three classes."""
    from support.tiny import SMALL_GRIDS, tiny_artifact

    return tiny_artifact(tmp_path_factory.mktemp("model") / "model.onnx", (64, 96), SMALL_GRIDS)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained FPN with a ResNet-18."""
    from support.networks import make_checkpoint

    path = tmp_path_factory.mktemp("checkpoint") / "best.pth"
    make_checkpoint(path)
    return path


@pytest.fixture(scope="session")
def source(checkpoint: Path) -> ExportSource:
    """The checkpoint as export loads it, with PyTorch's outputs."""
    from cloudrt.export.source import ExportSource, SourceOptions

    made = ExportSource(checkpoint, SourceOptions(calibrate=True, max_images=16))
    made.run_pytorch()
    return made
