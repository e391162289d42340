"""Stores with flipped bits are refused, and runs that are killed while they append lose no day."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.files import contents
from support.kills import run_and_kill
from support.placed import write_days

from cloudrt.errors import DataError
from cloudrt.geo.grid import write_frequencies
from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.geo.positions import Position
from cloudrt.geo.store import Store


def place_of(day: int) -> MaskGrid:
    return MaskGrid((40, 60), Position(-60.1, 14.3, 0.1, 0.1, date=datetime.date(2020, 1, day)))


def append(store: Path, *days: int) -> None:
    with Store(store, ("Fish", "Sugar")) as opened:
        for day in days:
            opened.append(f"{day}.png", (f"{day} 700 1500 40", "1 5"), place_of(day))


def read(store: Path, output: Path) -> Any:
    """The frequencies of a store."""
    import xarray

    write_frequencies(store, output, 0.5, overwrite=True)
    with xarray.open_dataset(output, engine="h5netcdf") as found:
        return found.load()


def flips(data: bytes, count: int, random: np.random.Generator) -> list[bytes]:
    """Return `count` copies of the data, with one bit flipped in each."""
    found = []
    for bit in random.choice(8 * len(data), count, replace=False).tolist():
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        found.append(bytes(damaged))
    return found


@pytest.mark.parametrize("count", [1, pytest.param(16, marks=pytest.mark.slow)])
def test_flipped_bits_are_refused_or_change_nothing(tmp_path: Path, count: int) -> None:
    """Bits of each file are flipped: `cloudrt grid` and an append refuse the store, or give the same result."""
    store, random = tmp_path / "days.zarr", np.random.default_rng(0)
    append(store, 1, 2, 3)
    expected = read(store, tmp_path / "sound.nc")
    files = sorted(path for path in store.rglob("*") if path.is_file() and path.name != ".lock")
    assert {path.parent.name for path in files} == {"days.zarr", "mask", "time", "image", "lat", "lon", "pattern"}
    refused = 0
    for path in files:
        sound = path.read_bytes()
        for damaged in flips(sound, count, random):
            path.write_bytes(damaged)
            for use in (lambda: read(store, tmp_path / "found.nc"), lambda: append(store)):
                try:
                    found = use()
                except DataError:
                    refused += 1
                else:
                    assert found is None or found.identical(expected), path
        path.write_bytes(sound)
    assert refused > count * len(files)
    append(store, 4)
    assert read(store, tmp_path / "sound.nc").isel(time=slice(3)).identical(expected)


@pytest.mark.parametrize("name", ["lat", "lon", "time", "image", "pattern"])
def test_each_axis_has_a_checksum(tmp_path: Path, name: str) -> None:
    """Plausible values that differ from those that were written."""
    import zarr

    store = tmp_path / "days.zarr"
    append(store, 1, 2)
    array: Any = zarr.open_group(store, mode="r+", zarr_format=2, use_consolidated=False)[name]
    change: dict[str, Callable[[Any], Any]] = {
        "time": lambda values: values + 1,
        "image": lambda values: np.array(["3.png", *values[1:]], values.dtype),
        "pattern": lambda values: values[::-1],
    }
    array[:] = change.get(name, lambda values: values + 1e-9)(array[:])
    for use in (lambda: read(store, tmp_path / "found.nc"), lambda: append(store, 3)):
        with pytest.raises(DataError, match=f"the values of {name} do not match their checksum"):
            use()


@pytest.mark.parametrize("lacking", [("crc32_axes",), ("crc32_axes", "crc32")])
def test_a_store_without_checksums_is_appended_to(tmp_path: Path, lacking: tuple[str, ...]) -> None:
    """Stores of earlier versions."""
    store = tmp_path / "days.zarr"
    append(store, 1)
    path = store / "mask" / ".zattrs"
    attributes = json.loads(path.read_text())
    consolidated = json.loads((store / ".zmetadata").read_text())
    for name in lacking:
        del attributes[name], consolidated["metadata"]["mask/.zattrs"][name]
    path.write_text(json.dumps(attributes))
    (store / ".zmetadata").write_text(json.dumps(consolidated))
    append(store, 2)
    assert "crc32_axes" in json.loads(path.read_text())
    assert read(store, tmp_path / "found.nc").sizes["time"] == 2


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.slow
def test_a_run_that_is_killed_while_it_appends(model: Path, tmp_path: Path) -> None:
    """With --resume, the store has the bytes of a run that was not killed."""
    random = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    write_days(tmp_path / "in", 5)

    def run(output: Path, after: int, *more: str | Path) -> tuple[int, int]:
        words = ["infer", tmp_path / "in", "-o", output, "-m", model, "--provider", "cpu", "--tile", *more]
        return run_and_kill([*words, "--batch-size", "3", "--threads", "1"], output.parent, after)

    whole, cut = tmp_path / "whole" / "s.zarr", tmp_path / "cut" / "s.zarr"
    for output in (whole, cut):
        output.parent.mkdir()
    _, changes = run(whole, -1)
    for number in range(4):
        after = int(random.integers(changes // 3, changes // 2) if number == 0 else random.integers(changes // 6))
        assert run(cut, after, *(["--resume"] if number else []))[0] == -9
    assert run(cut, -1, "--resume")[0] == 0
    assert contents(cut) == contents(whole)
    assert {path.name for path in cut.parent.iterdir()} == {path.name for path in whole.parent.iterdir()}
