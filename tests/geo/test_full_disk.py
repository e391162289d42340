"""Runs on a disk that is full: one line, the journal and the store stay usable, and --resume gives the same bytes.

A limit of the size of files stands for the full disk: the kernel refuses each write that would exceed it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from support.tiny import SMALL_GRIDS, tiny_artifact

from cloudrt.cli.infer import infer
from cloudrt.inference.outputs import write_rows
from cloudrt.masks.postprocess import Rule

resource = pytest.importorskip("resource")
DAYS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny artifact with a field of view of 180x120 pixels."""
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    return tiny_artifact(path, (120, 180), SMALL_GRIDS, rules=(Rule(127, 20),) * 3, field_of_view=(120, 180))


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Panoramas with many bright blobs, one a day."""
    folder, random = tmp_path_factory.mktemp("in"), np.random.default_rng(0)
    for day in range(1, DAYS + 1):
        noise = cv2.GaussianBlur(random.random((240, 360)).astype(np.float32), (0, 0), 5)
        image = np.where(noise > 0.5, 220, 30).astype(np.uint8)
        assert cv2.imwrite(str(folder / f"Aqua_2020010{day}_0-3.6_0-2.4.png"), image)
    return folder


def words(days: Path, model: Path, output: Path, *more: str) -> list[str]:
    settled = ["-m", str(model), "--provider", "cpu", "--batch-size", "3", "--threads", "2"]
    return [str(days), "-o", str(output), *settled, *more]


def content(output: Path) -> dict[str, bytes]:
    """The bytes of an output, a file or a folder."""
    files = [path for path in sorted(output.rglob("*")) if path.is_file()] if output.is_dir() else [output]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def days_of(store: Path) -> int:
    """The number of days of a store; all of them have been written."""
    import xarray

    if not store.exists():
        return 0
    with xarray.open_zarr(store, consolidated=True) as data:
        assert data["mask"].sizes["time"] == data.sizes["time"] == len(data["image"].values)
        assert all(0.1 < float(data["mask"][day].mean()) < 0.9 for day in range(data.sizes["time"]))
        return int(data.sizes["time"])


def limited(limit: int, function: Callable[..., None]) -> Callable[..., None]:
    """Return a function during which no file becomes larger than `limit` bytes."""

    def call(*arguments: Any) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            function(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return call


@pytest.mark.parametrize(
    "name",
    ["s.zarr", *(pytest.param(f"s.{form}", marks=pytest.mark.slow) for form in ("geojson", "geoparquet", "csv"))],
)
def test_an_output_that_does_not_fit(
    name: str, days: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output = tmp_path / "whole" / name, tmp_path / "full" / name
    more = ["--tile", "--simplify", "0"] if "geo" in name else ["--tile"]
    limit, failures, counts = 0, 0, [1]
    if name == "s.zarr":  # the other days are appended
        for store in (whole, output):
            first = next(days.iterdir())
            assert CliRunner().invoke(infer, words(first, model, store)).exit_code == 0
    done = CliRunner().invoke(infer, words(days, model, whole, *more))
    assert done.exit_code == 0, done.output
    while True:
        monkeypatch.setattr("cloudrt.inference.submission.write_rows", limited(limit, write_rows))
        resume = ["--resume"] if failures else []
        done = CliRunner().invoke(infer, words(days, model, output, *more, *resume))
        if done.exit_code == 0:
            break
        failures += 1
        line = done.output.splitlines()[-1]
        assert done.exit_code == 2 and line.startswith("Error: ") and "File too large" in line, done.output
        assert name in line and "unexpected" not in done.output
        assert f"{name}.journal contains the finished images; --resume continues" in done.output
        left = {path.name for path in output.parent.iterdir()}
        if name == "s.zarr":
            counts.append(days_of(output))
        assert left - {"s.zarr", "s.zarr.run.json"} == {f"{name}.journal"}
        limit = 2 * limit + 50
    assert failures > 2 and content(output) == content(whole)
    assert counts == sorted(counts) and (name != "s.zarr" or days_of(output) == DAYS)
    assert {path.name for path in output.parent.iterdir()} == {path.name for path in whole.parent.iterdir()}


@pytest.mark.parametrize("name", ["s.geojson", pytest.param("s.zarr", marks=pytest.mark.slow)])
def test_a_journal_that_does_not_fit(name: str, days: Path, model: Path, tmp_path: Path) -> None:
    whole, output = tmp_path / "whole" / name, tmp_path / "full" / name
    assert CliRunner().invoke(infer, words(days, model, whole)).exit_code == 0
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))"
    code += "; from cloudrt.cli import infer; infer()"
    command = [sys.executable, "-c", code, *words(days, model, output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert f"{name}.journal: File too large" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert [path.name for path in output.parent.iterdir()] == [f"{name}.journal"]
    assert CliRunner().invoke(infer, words(days, model, output, "--resume")).exit_code == 0
    assert content(output) == content(whole)
