"""Georeferenced images: positions, panoramas in tiles, polygons, and stores of daily masks."""
