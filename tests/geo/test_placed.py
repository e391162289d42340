"""Masks with positions: shapes drawn at known coordinates are found there in every format."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from support.placed import BOX, EAST, HOLE, NORTH, PIXEL, SOUTH, WEST, reasons, run, write_scene
from support.tiny import SMALL_GRIDS

from cloudrt.cli import main
from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.geo.polygons import cell_areas, features
from cloudrt.geo.positions import Position
from cloudrt.masks.postprocess import encode_mask


@pytest.mark.parametrize("form", ["geojson", "geoparquet"])
def test_polygons_are_where_they_were_drawn(form: str, model: Path, tmp_path: Path) -> None:
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


def test_masks_are_written_as_geotiff(model: Path, tmp_path: Path) -> None:
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


def test_an_image_that_reaches_beyond_the_earth_fails_alone(model: Path, tmp_path: Path) -> None:
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
    assert list(reasons(summary)) == ["c.tif"] and "reaches beyond the part of the Earth" in reasons(summary)["c.tif"]
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


def test_bounds_of_the_command_place_an_image(model: Path, tmp_path: Path) -> None:
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
