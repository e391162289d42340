"""Stores of days: masks are found at their coordinates, damage is detected, and kills and full disks do no damage."""

from __future__ import annotations

import datetime
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from support.files import contents
from support.placed import BOX, PIXEL, days_of, reasons, run, write_scene
from support.tiny import SMALL_GRIDS

from cloudrt.cli import main
from cloudrt.errors import DataError
from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.geo.positions import Position
from cloudrt.geo.store import Store, StoreDays
from cloudrt.inference.outputs import output_digest


def test_a_store_of_days_and_its_frequencies(model: Path, tmp_path: Path) -> None:
    import xarray

    folder = tmp_path / "in"
    for day in (3, 4):
        write_scene(folder, day, hole=day == 3)
    store = tmp_path / "days.zarr"
    run(folder, store, model)
    run(write_scene(tmp_path / "later", 9), store, model)  # appended
    with xarray.open_zarr(store) as data:
        mask = data["mask"]
        assert mask.dims == ("time", "lat", "lon", "pattern") and mask.sizes["time"] == 3
        assert mask.encoding["chunks"][0] == 1
        assert [str(day)[:10] for day in data["time"].values] == ["2020-01-03", "2020-01-04", "2020-01-09"]
        assert list(data["pattern"].values) == list(SMALL_GRIDS.classes)
        assert (data["lat"].attrs["units"], data["lon"].attrs["units"]) == ("degrees_north", "degrees_east")
        for day in data["time"].values:
            fish = mask.sel(time=day, pattern="Fish")
            there = fish.where(fish == 1, drop=True)
            found = [there.lon.min(), there.lat.min(), there.lon.max(), there.lat.max()]
            half = np.array([-1, -1, 1, 1]) * PIXEL / 2
            assert np.abs(np.array(found, float) + half - BOX).max() <= PIXEL / 2 + 1e-6
            assert bool(fish.sel(lon=-54.25, method="nearest").isnull().all())  # the swath has no data
        cover = (mask.sel(pattern="Fish") == 1).astype(float).values
        known = mask.sel(pattern="Fish").notnull().values
        lat, lon = data["lat"].values, data["lon"].values
    result = CliRunner().invoke(main, ["grid", str(store), "--degrees", "1", "-o", str(tmp_path / "freq.nc")])
    assert result.exit_code == 0, result.output
    again = CliRunner().invoke(main, ["grid", str(store), "--degrees", "1", "-o", str(tmp_path / "freq.zarr")])
    assert again.exit_code == 0, again.output
    for suffix, engine in (("nc", "h5netcdf"), ("zarr", "zarr")):
        with xarray.open_dataset(tmp_path / f"freq.{suffix}", engine=engine) as found_freq:
            assert found_freq["freq"].dims == ("time", "lat", "lon", "pattern")
            assert found_freq["freq"].shape == (3, 4, 7, 3)
            for day in range(3):
                for cell_lat in found_freq["lat"].values:
                    for cell_lon in found_freq["lon"].values:
                        inside = np.outer(abs(lat - cell_lat) < 0.5, abs(lon - cell_lon) < 0.5)
                        share = cover[day][inside].sum() / max(known[day][inside].sum(), 1)
                        one = found_freq.isel(time=day).sel(lat=cell_lat, lon=cell_lon)
                        assert float(one["freq"].sel(pattern="Fish")) == pytest.approx(share, abs=1e-6)
                        assert float(one["valid"]) == pytest.approx(known[day][inside].mean(), abs=1e-6)
    refused = CliRunner().invoke(main, ["grid", str(store), "-o", str(tmp_path / "freq.nc")])
    assert refused.exit_code == 2 and "exists" in refused.output
    missing = CliRunner().invoke(main, ["grid", str(tmp_path / "in"), "-o", str(tmp_path / "b.nc")])
    assert missing.exit_code == 2 and "is not a store" in missing.output and missing.output.count("\n") == 1


def test_a_damaged_store_gives_no_frequencies(model: Path, tmp_path: Path) -> None:
    store = tmp_path / "out.zarr" / "days.zarr"
    write_scene(tmp_path / "in", 3)
    second = write_scene(tmp_path / "in", 4)
    store.parent.mkdir()
    run(tmp_path / "in", store, model)
    inside = CliRunner().invoke(main, ["grid", str(store), "-o", str(store.parent), "--overwrite"])
    assert inside.exit_code == 2 and "lies below" in inside.output and store.is_dir()
    for name in ("mask/freq.zarr", "freq.nc"):
        below = CliRunner().invoke(main, ["grid", str(store), "-o", str(store / name)])
        assert below.exit_code == 2 and "lies below" in below.output and not (store / name).exists()
    (store / "mask" / "1.0.0.0").unlink()  # zarr fills a missing chunk
    result = CliRunner().invoke(main, ["grid", str(store), "-o", str(tmp_path / "freq.nc")])
    assert result.exit_code == 2 and "20200104" in result.output and "damaged" in result.output
    assert not (tmp_path / "freq.nc").exists()
    run(second, store, model)  # the day is replaced
    result = CliRunner().invoke(main, ["grid", str(store), "-o", str(tmp_path / "freq.nc")])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", ["time/0", "image/0", "lat/0", "pattern/.zarray", ".zmetadata"])
def test_nothing_is_appended_to_a_damaged_store(model: Path, tmp_path: Path, name: str) -> None:
    store = tmp_path / "days.zarr"
    for day in (3, 4):
        write_scene(tmp_path / "in", day)
    run(tmp_path / "in", store, model)
    (store / name).unlink()
    before = contents(store)
    with pytest.raises(DataError, match="is not a store that"):
        run(write_scene(tmp_path / "later", 9), store, model)
    assert contents(store) == before
    result = CliRunner().invoke(main, ["grid", str(store), "-o", str(tmp_path / "freq.nc")])
    assert result.exit_code == 2 and "is not a store that" in result.output


def test_what_a_store_cannot_hold_fails_alone(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, store = tmp_path / "in", tmp_path / "days.zarr"
    write_scene(folder, 3)
    write_scene(folder, 3, name="Terra_20200103_-61--54_10-14.png")
    write_scene(folder, 4, name="Terra_20200104_-60--53_10-14.png")
    write_scene(folder, 5, name="nodate_-61--54_10-14.png")
    write_scene(folder, 6, name="noplace20200106.png")
    write_scene(folder, 7)
    summary = run(folder, store, model)
    failed = reasons(summary)
    assert len(failed) == 4 and summary.failed == 4
    assert "taken by Aqua_20200103" in failed["Terra_20200103_-61--54_10-14.png"]
    assert "another grid than the first image" in failed["Terra_20200104_-60--53_10-14.png"]
    assert "no date" in failed["nodate_-61--54_10-14.png"]
    assert "no position" in failed["noplace20200106.png"]
    assert days_of(store) == [3, 7]
    later = tmp_path / "later"
    write_scene(later, 8, name="Aqua_20200108_-60--53_10-14.png")
    write_scene(later, 9)
    assert "another grid than" in reasons(run(later, store, model))["Aqua_20200108_-60--53_10-14.png"]
    assert days_of(store) == [3, 7, 9]
    caplog.set_level(logging.INFO, "cloudrt")
    run(later / "Aqua_20200109_-61--54_10-14.png", store, model)  # the same image again: the day is replaced
    assert f"{store}: replaced 1 days that an earlier run wrote" in caplog.messages
    assert days_of(store) == [3, 7, 9]
    (tmp_path / "other.zarr").mkdir()
    with pytest.raises(DataError, match="is not a store"):
        run(later, tmp_path / "other.zarr", model)
    with pytest.raises(DataError, match="holds the patterns Fish"):
        StoreDays(store, ("Sugar",))


def place_of(day: int) -> MaskGrid:
    return MaskGrid((20, 300), Position(0, 10, 0.5, 0.5, date=datetime.date(2020, 1, day)))


def append_and_die(store: Path, day: int, step: int, text: str = "1 2000") -> int:
    """Append a day in a child process that is killed before its write number `step`; return its exit status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about threads
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = step

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event == "os.rename" or (event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR)))
        if writes and "days.zarr" in str(arguments[0]):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    status = 1
    try:
        sys.addaudithook(hook)
        with Store(store, ("Fish",)) as opened:
            opened.append(f"{day}.png", (text,), place_of(day))
        status = 0
    finally:
        os._exit(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_a_store_survives_a_kill_at_every_write(tmp_path: Path, stride: int) -> None:
    import xarray

    store = tmp_path / "days.zarr"
    days, step, killed = 0, 0, 0
    while days < 2:
        status = append_and_die(store, days + 1, step)
        assert status in (0, -signal.SIGKILL)
        killed += status != 0
        step = step + (stride if days else 10 * stride) if status else 0
        if store.exists():
            with xarray.open_zarr(store, consolidated=True) as data:
                count = data.sizes["time"]
                assert count == data["mask"].sizes["time"] and days <= count <= days + 1
                assert (data["mask"].values.sum(axis=(1, 2, 3)) == 2000).all()
                assert [int(key.partition(".")[0]) for key in data["image"].values] == list(range(1, count + 1))
            days = days + 1 if status == 0 else days
    assert killed > 3
    status, step = -signal.SIGKILL, 0
    while status:  # replace the first day
        status = append_and_die(store, 1, step, "1 1000")
        step += stride
        with xarray.open_zarr(store, consolidated=True) as data:
            first, second = data["mask"].values.sum(axis=(1, 2, 3))
            assert first in ((2000, 1000) if status else (1000,)) and second == 2000
            assert list(data["image"].values) == ["1.png", "2.png"]
    assert step > 3 * stride


def test_the_digest_of_a_store_changes_with_its_masks(tmp_path: Path) -> None:
    store, digests = tmp_path / "days.zarr", []
    for day, text in ((1, "1 2000"), (2, "1 2000"), (1, "1 1999"), (1, "1 2000")):
        with Store(store, ("Fish",)) as opened:
            opened.append(f"{day}.png", (text,), place_of(day))
        digests.append(output_digest(store))
    assert len(set(digests)) == 3 and digests[3] == digests[1]


def test_a_full_disk_leaves_the_store_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    store = tmp_path / "days.zarr"
    with Store(store, ("Fish",)) as opened:
        opened.append("1.png", ("1 2000",), place_of(1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Store(store, ("Fish",)) as opened, monkeypatch.context() as patch:
        patch.setattr("cloudrt.geo.store._consolidate", full)
        with pytest.raises(OSError, match="No space left") as raised:
            opened.append("2.png", ("1 2000",), place_of(2))
        assert raised.value.filename == str(store)
    assert days_of(store) == [1]
    with Store(store, ("Fish",)) as opened:
        opened.append("3.png", ("1 2000",), place_of(3))
    assert days_of(store) == [1, 3]
    with pytest.raises(DataError, match="holds the patterns Fish"), Store(store, ("Sugar",)):
        pass
