"""Masks with positions: shapes drawn at known coordinates are found there in every format."""

from __future__ import annotations

import csv
import datetime
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from support.tiny import SMALL_GRIDS, tiny_artifact

import cloudrt
from cloudrt.cli import main
from cloudrt.errors import DataError
from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.geo.polygons import cell_areas, features
from cloudrt.geo.positions import Position
from cloudrt.geo.store import Store, StoreDays
from cloudrt.inference.outputs import output_digest
from cloudrt.inference.task import RunSummary
from cloudrt.masks.postprocess import Rule, encode_mask

WEST, SOUTH, EAST, NORTH = -61.0, 10.0, -54.0, 14.0
PIXEL = 0.02
"""Degrees per pixel of the masks: two pixels of the image."""
BOX = (-58.98, 11.3, -56.0, 12.98)
"""West, south, east and north of the bright rectangle."""
RULES = (Rule(253, 20), Rule(127, 20), Rule(127, 20))
"""Thresholds at which the blurred edge of the rectangle is at its position."""
HOLE = (-58.0, 11.8, -57.5, 12.3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny artifact with a field of view of 180x120 pixels that segments bright pixels."""
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    return tiny_artifact(path, (120, 180), SMALL_GRIDS, rules=RULES, field_of_view=(120, 180))


def draw(box: tuple[float, ...], value: int, image: NDArray[np.uint8]) -> None:
    west, south, east, north = box
    rows = slice(round((NORTH - north) * 100), round((NORTH - south) * 100))
    image[rows, round((west - WEST) * 100) : round((east - WEST) * 100)] = value


def write_scene(folder: Path, day: int, *, name: str = "", hole: bool = True) -> Path:
    """Write a panorama of 7x4 degrees with a bright rectangle, a hole in it and a black swath at its eastern edge."""
    image = np.full((400, 700, 3), 30, np.uint8)
    draw(BOX, 220, image)
    if hole:
        draw(HOLE, 30, image)
    image[:, 650:] = 0
    folder.mkdir(exist_ok=True)
    path = folder / (name or f"Aqua_{20200100 + day}_-61--54_10-14.png")
    assert cv2.imwrite(str(path), image)
    return path


def run(inputs: Path, output: Path, model: Path, **options: object) -> RunSummary:
    return cloudrt.infer(inputs, output, model, provider="cpu", threads=2, **options)  # type: ignore[arg-type]


def reasons(summary: RunSummary) -> dict[str, str]:
    assert summary.failures
    with summary.failures.open() as file:
        return dict(list(csv.reader(file))[1:])


@pytest.mark.parametrize("form", ["geojson", "geoparquet"])
def test_polygons_come_back_where_they_were_drawn(form: str, model: Path, tmp_path: Path) -> None:
    import geopandas

    image = write_scene(tmp_path / "in", 5)
    output = tmp_path / f"a.{form}"
    run(image, output, model)
    table = geopandas.read_file(output) if form == "geojson" else geopandas.read_parquet(output)
    assert table.crs.to_string() in ("OGC:CRS84", "EPSG:4326")
    assert list(table["pattern"]) == list(SMALL_GRIDS.classes)
    assert {str(date)[:10] for date in table["date"]} == {"2020-01-05"} and set(table["image"]) == {image.name}
    for _, row in table.iterrows():
        assert row.geometry.is_valid and row.geometry.geom_type == "Polygon" and len(row.geometry.interiors) == 1
        assert np.abs(np.array(row.geometry.bounds) - BOX).max() <= PIXEL / 2 + 1e-9
        assert np.abs(np.array(row.geometry.interiors[0].bounds) - HOLE).max() <= PIXEL / 2 + 1e-9
        area = (geodesic_area(BOX) - geodesic_area(HOLE)) / 1e6
        assert row.area_km2 == pytest.approx(area, rel=0.02)
        assert 0.9 < row.probability <= 1


def geodesic_area(box: tuple[float, ...]) -> float:
    import shapely
    from pyproj import Geod

    area, _ = Geod(ellps="WGS84").geometry_area_perimeter(shapely.segmentize(shapely.box(*box), 0.01))
    return abs(area)


def test_areas_are_those_of_geodesics() -> None:
    for south, north in ((-5.0, -4.5), (0.0, 1.0), (60.0, 61.0), (88.0, 90.0)):
        (area,) = cell_areas(np.array([north, south]), 2.0)
        assert area * 1e6 == pytest.approx(geodesic_area((10, south, 12, north)), rel=1e-6)


def test_masks_come_back_as_geotiff(model: Path, tmp_path: Path) -> None:
    import rasterio

    image = write_scene(tmp_path / "in", 5)
    run(image, tmp_path / "a.csv", model, tile=True, masks=tmp_path / "masks")
    with rasterio.open(tmp_path / "masks" / "Fish" / f"{image.name}.tif") as file:
        mask, bounds = file.read(1), file.bounds
        assert file.crs == "EPSG:4326" and file.nodata == 255
        assert tuple(bounds) == pytest.approx((WEST, SOUTH, EAST, NORTH))
        rows, columns = np.nonzero(mask == 1)
        west, north = file.transform @ (columns.min(), rows.min())
        east, south = file.transform @ (columns.max() + 1, rows.max() + 1)
        assert np.abs(np.array([west, south, east, north]) - BOX).max() <= PIXEL / 2 + 1e-9
        assert (mask[:, 326:] == 255).all() and not (mask[:, :324] == 255).any()
    run(write_scene(tmp_path / "plain", 5, name="b.png"), tmp_path / "b.csv", model, tile=True, masks=tmp_path / "m")
    picture = cv2.imread(str(tmp_path / "m" / "Fish" / "b.png.png"), cv2.IMREAD_GRAYSCALE)
    assert picture is not None and picture.shape == (200, 350)  # without a position: PNG, on the panorama's grid


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
    write_scene(tmp_path / "in", 4)
    store.parent.mkdir()
    run(tmp_path / "in", store, model)
    inside = CliRunner().invoke(main, ["grid", str(store), "-o", str(store.parent), "--overwrite"])
    assert inside.exit_code == 2 and "would be replaced" in inside.output and store.is_dir()
    (store / "mask" / "1.0.0.0").unlink()  # zarr fills a missing chunk
    result = CliRunner().invoke(main, ["grid", str(store), "-o", str(tmp_path / "freq.nc")])
    assert result.exit_code == 2 and "20200104" in result.output and "damaged" in result.output
    assert not (tmp_path / "freq.nc").exists()
    run(tmp_path / "in" / sorted(path.name for path in (tmp_path / "in").iterdir())[1], store, model)
    result = CliRunner().invoke(main, ["grid", str(store), "-o", str(tmp_path / "freq.nc")])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", ["time/0", "image/0", "lat/0", "pattern/.zarray", ".zmetadata"])
def test_nothing_is_appended_to_a_damaged_store(model: Path, tmp_path: Path, name: str) -> None:
    store = tmp_path / "days.zarr"
    for day in (3, 4):
        write_scene(tmp_path / "in", day)
    run(tmp_path / "in", store, model)
    (store / name).unlink()
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    with pytest.raises(DataError, match="is not a store that"):
        run(write_scene(tmp_path / "later", 9), store, model)
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    result = CliRunner().invoke(main, ["grid", str(store), "-o", str(tmp_path / "freq.nc")])
    assert result.exit_code == 2 and "is not a store that" in result.output


def test_what_a_store_cannot_hold_fails_alone(model: Path, tmp_path: Path) -> None:
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
    assert days_of(store) == ["2020-01-03", "2020-01-07"]
    later = tmp_path / "later"
    write_scene(later, 8, name="Aqua_20200108_-60--53_10-14.png")
    write_scene(later, 9)
    assert "another grid than" in reasons(run(later, store, model))["Aqua_20200108_-60--53_10-14.png"]
    assert days_of(store) == ["2020-01-03", "2020-01-07", "2020-01-09"]
    run(later / "Aqua_20200109_-61--54_10-14.png", store, model)  # the same image again: the day is replaced
    assert days_of(store) == ["2020-01-03", "2020-01-07", "2020-01-09"]
    (tmp_path / "other.zarr").mkdir()
    with pytest.raises(DataError, match="is not a store"):
        run(later, tmp_path / "other.zarr", model)
    with pytest.raises(DataError, match="holds the patterns Fish"):
        StoreDays(store, ("Sugar",))


def days_of(store: Path) -> list[str]:
    import xarray

    with xarray.open_zarr(store, consolidated=True) as data:
        assert data["mask"].sizes["time"] == data.sizes["time"] == len(data["image"].values)
        for day in range(data.sizes["time"]):
            assert set(np.unique(data["mask"][day, :, :300].values)) <= {0.0, 1.0}  # written, and not the fill value
        return [str(day)[:10] for day in data["time"].values]


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
    assert days_of(store) == ["2020-01-01"]
    with Store(store, ("Fish",)) as opened:
        opened.append("3.png", ("1 2000",), place_of(3))
    assert days_of(store) == ["2020-01-01", "2020-01-03"]
    with pytest.raises(DataError, match="holds the patterns Fish"), Store(store, ("Sugar",)):
        pass


def test_outlines_are_valid_and_near_the_pixels() -> None:
    import shapely
    from rasterio.features import rasterize
    from rasterio.transform import from_origin

    random = np.random.default_rng(0)
    noise = cv2.GaussianBlur(random.random((80, 120)).astype(np.float32), (0, 0), 1.5)
    mask = (noise > 0.5).astype(np.uint8)
    position = Position(10, 20, 0.04, 0.04)
    for simplify in (0, 0.5, 2):
        place = MaskGrid((80, 120), position, means=((0.5,) * 1000,))
        found = list(features("a", {"Fish": encode_mask(mask)}, place, simplify))
        assert all(one.geometry.is_valid for one in found) and len(found) > 5
        assert any(shapely.get_num_interior_rings(shapely.get_parts(one.geometry)).sum() for one in found)
        again = rasterize([one.geometry for one in found], mask.shape, transform=from_origin(10, 20, 0.04, 0.04))
        assert (again != mask).mean() == 0 if simplify == 0 else (again != mask).mean() < 0.1
    exact = shapely.union_all([one.geometry for one in features("a", {"Fish": encode_mask(mask)}, place, 0)])
    close = shapely.union_all([one.geometry for one in features("a", {"Fish": encode_mask(mask)}, place, 0.5)])
    assert exact.boundary.hausdorff_distance(close.boundary) <= 0.5 * 0.04 + 1e-9


def test_polygons_are_cut_at_the_date_line() -> None:
    mask = np.zeros((10, 40), np.uint8)
    mask[2:5, 15:25] = 1
    place = MaskGrid((10, 40), Position(170, 5, 0.5, 0.5), means=((0.5,),))
    (one,) = features("a", {"Fish": encode_mask(mask)}, place, 0.5)
    assert one.geometry.is_valid and one.geometry.geom_type == "MultiPolygon"
    assert sorted(part.bounds for part in one.geometry.geoms) == [(-180, 2.5, -177.5, 4), (177.5, 2.5, 180, 4)]
    assert all(part.exterior.is_ccw for part in one.geometry.geoms)
    around = MaskGrid((10, 720), Position(-180, 5, 0.5, 0.5), wraps=True, means=((0.5,),))
    ring = np.zeros((10, 720), np.uint8)
    ring[2:5, :5] = ring[2:5, -5:] = 1
    (both,) = features("a", {"Fish": encode_mask(ring)}, around, 0.5)
    assert both.geometry.equals(one.geometry) and both.area_km2 == pytest.approx(one.area_km2)


@pytest.mark.parametrize("left", [1, 12])
def test_a_projected_polygon_is_cut_at_the_date_line(left: int) -> None:
    """In EPSG:3832, Mercator around 150 degrees east, the date line is an ordinary meridian."""
    from pyproj import Transformer

    degree = 6378137 * np.pi / 180
    mask = np.zeros((10, 40), np.uint8)
    mask[2:5, left:25] = 1
    mask[3, left + 2] = 0
    position = Position(20 * degree, 5 * degree, degree / 2, degree / 2, "EPSG:3832", 1 / 111_195)  # from 170 degrees
    (one,) = features("a", {"Fish": encode_mask(mask)}, MaskGrid((10, 40), position, means=((0.5,),)), 0.5)
    east, west = sorted(one.geometry.geoms, key=lambda part: part.bounds[0], reverse=True)
    _, (south, north) = Transformer.from_crs("EPSG:3832", "EPSG:4326", always_xy=True).transform(
        [0, 0], [2.5 * degree, 4 * degree]
    )
    assert one.geometry.is_valid and all(part.exterior.is_ccw for part in one.geometry.geoms)
    assert not any(ring.is_ccw for part in one.geometry.geoms for ring in part.interiors) and len(east.interiors) == 1
    assert east.bounds == pytest.approx((170 + left / 2, south, 180, north))
    assert west.bounds == pytest.approx((-180, south, -177.5, north))
    exact = geodesic_area((170 + left / 2, south, 182.5, north))
    assert one.area_km2 == pytest.approx(exact / 1e6, rel=0.05)


def test_an_image_beside_the_earth_fails_alone(model: Path, tmp_path: Path) -> None:
    import rasterio
    from rasterio.transform import from_origin

    folder, metres = tmp_path / "in", 1111.95
    write_scene(folder, 3)
    geos = "+proj=geos +h=35785831 +lon_0=0 +sweep=y"
    profile = {"driver": "GTiff", "height": 200, "width": 300, "count": 3, "dtype": "uint8", "crs": geos}
    for name, west in (("b.tif", 0.0), ("c.tif", 5.3e6)):
        with rasterio.open(folder / name, "w", transform=from_origin(west, 1e5, metres, metres), **profile) as file:
            file.write(np.full((3, 200, 300), 220, np.uint8))
    output = tmp_path / "a.geojson"
    summary = run(folder, output, model)
    assert list(reasons(summary)) == ["c.tif"] and "reaches beyond the Earth" in reasons(summary)["c.tif"]
    images = {one["properties"]["image"] for one in json.loads(output.read_text())["features"]}
    assert len(images) == 2 and "b.tif" in images
    assert not run(folder / "c.tif", tmp_path / "a.csv", model, tile=True).failed  # no longitudes are needed


def test_other_reference_systems_become_longitude_and_latitude(model: Path, tmp_path: Path) -> None:
    import rasterio
    from rasterio.transform import from_origin
    from rasterio.warp import transform_bounds

    image = np.full((400, 700), 30, np.uint8)
    image[100:200, 300:500] = 220
    profile = {"driver": "GTiff", "height": 400, "width": 700, "count": 3, "dtype": "uint8", "crs": "EPSG:32620"}
    metres = 1111.95
    with rasterio.open(tmp_path / "a.tif", "w", transform=from_origin(2e5, 1.5e6, metres, metres), **profile) as file:
        file.write(np.stack([image] * 3))
    run(tmp_path / "a.tif", tmp_path / "a.geojson", model, masks=tmp_path / "masks")
    box = 2e5 + 300 * metres, 1.5e6 - 200 * metres, 2e5 + 500 * metres, 1.5e6 - 100 * metres
    (fish, *_) = json.loads((tmp_path / "a.geojson").read_text())["features"]
    found = np.array(fish["geometry"]["coordinates"][0])
    exact = np.array(transform_bounds("EPSG:32620", "EPSG:4326", *box))
    assert np.abs(np.concatenate([found.min(axis=0), found.max(axis=0)]) - exact).max() < 0.011
    assert fish["properties"]["area_km2"] == pytest.approx(200 * 100 * metres**2 / 1e6, rel=0.02)
    with rasterio.open(tmp_path / "masks" / "Fish" / "a.tif.tif") as file:
        assert file.crs == "EPSG:32620" and file.transform.a == pytest.approx(2 * metres)


def test_the_command(model: Path, tmp_path: Path) -> None:
    image = write_scene(tmp_path / "in", 5, name="b.png")
    words = ["infer", str(image), "-m", str(model), "--provider", "cpu", "--batch-size", "4"]
    output = str(tmp_path / "b.geojson")
    result = CliRunner().invoke(main, [*words, "--bounds", "-61,10,-54,14", "-o", output, "--report"])
    assert result.exit_code == 0, result.output
    assert "position from its bounds: -61 to -54, 10 to 14 (EPSG:4326)" in result.output
    assert len(json.loads(Path(output).read_text())["features"]) == 3
    assert "data:image/" in (tmp_path / "b.geojson.html").read_text()
    for options, reason in (
        (["--bounds", "1,2,3", "--tile"], "LON1,LAT1,LON2,LAT2"),
        (["--bounds", "0,0,10,95", "--tile"], "outside the Earth"),
    ):
        result = CliRunner().invoke(main, [*words, *options, "-o", str(tmp_path / "c.csv")])
        assert result.exit_code == 2 and reason in result.output, result.output


def test_nothing_of_the_extra_is_imported_without_need() -> None:
    names = ["inference.run", "cli.infer", "cli.grid", "geo.store", "geo.polygons", "geo.grid", "geo.geotiff"]
    names += ["geo.frequency_maps", "cluster.panoramas"]
    extra = ["matplotlib", "rasterio", "shapely", "geopandas", "pyproj", "xarray", "zarr", "h5netcdf", "pyarrow"]
    code = f"import sys, {', '.join(f'cloudrt.{one}' for one in names)}; assert not set({extra}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
