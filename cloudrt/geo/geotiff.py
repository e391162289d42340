"""Masks as GeoTIFF."""

from __future__ import annotations

from pathlib import Path

from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.masks.rle import rle_decode
from cloudrt.system.files import replacing

NO_DATA = 255


def write_geotiff(path: Path, text: str, place: MaskGrid) -> None:
    """Write a mask as a compressed GeoTIFF of one band: 0, 1, or 255 where the image has no data."""
    import rasterio
    from rasterio.transform import from_origin

    position = place.position
    assert position is not None
    mask = rle_decode(text, place.grid)
    mask[rle_decode(place.no_data, place.grid) > 0] = NO_DATA
    height, width = place.grid
    transform = from_origin(position.west, position.north, position.pixel_width, position.pixel_height)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(path, sync=False) as partial,
        rasterio.open(
            partial,
            "w",
            driver="GTiff",
            height=height,
            width=width,
            count=1,
            dtype="uint8",
            crs=position.crs,
            transform=transform,
            nodata=NO_DATA,
            compress="deflate",
        ) as file,
    ):
        file.write(mask, 1)
