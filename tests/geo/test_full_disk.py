"""Runs on a full disk end with one line, the journal and the store stay usable, and --resume gives the same bytes.

The full disk is simulated by a limit on the size of files: the kernel refuses writes beyond it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.files import contents, file_size_limit
from support.placed import days_of, write_days

from cloudrt.cli.infer import infer
from cloudrt.inference.outputs import write_rows

pytest.importorskip("resource")
DAYS = 4


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in")
    write_days(folder, DAYS)
    return folder


def words(days: Path, model: Path, output: Path, *more: str) -> list[str]:
    common = ["-m", str(model), "--provider", "cpu", "--batch-size", "3", "--threads", "2"]
    return [str(days), "-o", str(output), *common, *more]


@pytest.mark.parametrize(
    "name",
    ["s.zarr", *(pytest.param(f"s.{form}", marks=pytest.mark.slow) for form in ("geojson", "geoparquet", "csv"))],
)
def test_an_output_that_does_not_fit(
    name: str, days: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output = tmp_path / "whole" / name, tmp_path / "full" / name
    more = ["--tile", "--simplify", "0"] if "geo" in name else ["--tile"]
    limit, failed, counts = 0, 0, [1]
    if name == "s.zarr":  # the other days are appended
        for store in (whole, output):
            first = min(days.iterdir())
            assert CliRunner().invoke(infer, words(first, model, store)).exit_code == 0
    done = CliRunner().invoke(infer, words(days, model, whole, *more))
    assert done.exit_code == 0, done.output

    def write_limited(*arguments: Any) -> None:
        with file_size_limit(limit):
            write_rows(*arguments)

    monkeypatch.setattr("cloudrt.inference.submission.write_rows", write_limited)
    while True:
        resume = ["--resume"] if failed else []
        done = CliRunner().invoke(infer, words(days, model, output, *more, *resume))
        if done.exit_code == 0:
            break
        failed += 1
        line = done.output.splitlines()[-1]
        assert done.exit_code == 2 and line.startswith("Error: ") and "File too large" in line, done.output
        assert name in line and "unexpected" not in done.output
        assert f"{name}.journal contains the finished images; --resume continues" in done.output
        left = {path.name for path in output.parent.iterdir()}
        if name == "s.zarr":
            counts.append(len(days_of(output)))
        assert left - {"s.zarr", "s.zarr.run.json"} == {f"{name}.journal"}
        limit = 2 * limit + 50
    assert failed > 2 and contents(output) == contents(whole)
    assert counts == sorted(counts) and (name != "s.zarr" or len(days_of(output)) == DAYS)
    assert {path.name for path in output.parent.iterdir()} == {path.name for path in whole.parent.iterdir()}


@pytest.mark.parametrize("name", ["s.geojson", pytest.param("s.zarr", marks=pytest.mark.slow)])
def test_a_journal_that_does_not_fit(name: str, days: Path, model: Path, tmp_path: Path) -> None:
    whole, output = tmp_path / "whole" / name, tmp_path / "full" / name
    assert CliRunner().invoke(infer, words(days, model, whole)).exit_code == 0
    command = [sys.executable, "-c", "from cloudrt.cli import infer; infer()", *words(days, model, output)]
    with file_size_limit(4000):  # the process inherits it
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert f"{name}.journal: File too large" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert [path.name for path in output.parent.iterdir()] == [f"{name}.journal"]
    assert CliRunner().invoke(infer, words(days, model, output, "--resume")).exit_code == 0
    assert contents(output) == contents(whole)
