"""Tiles: the overlap that agrees best with known images, seams, and speed and memory of panoramas.

    python -m cloudrt.bench.studies.tiles IMAGES TRUTH.csv -o FILE.json

IMAGES are labelled images of the submission grid's size that the network was not trained on, with their masks in
TRUTH.csv. Mosaics of them, at a quarter of the training resolution, are segmented as panoramas: as they are, where
many tiles begin at or near the edge of an image, and cropped by a random part of an image on each side. The masks of
each whole image are compared with those of the image alone, and with the labels; the same is done with synthetic
scenes, without labels. A step is the difference in level of two neighbouring columns.

Speed and memory are those of synthetic panoramas. The same number of single images has the same pixels as the tiles, as
JPEGs of the same quality; both are timed alternately.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.data.scenes import draw_scene
from cloudrt.geo.blend import Blend
from cloudrt.geo.tiles import Panorama, open_panorama
from cloudrt.geo.tiling import OVERLAP, Tiling
from cloudrt.images.image import Image, ImageFile, decode, find_images
from cloudrt.inference.panoramas import predict_panoramas
from cloudrt.inference.pipeline import Segmenter
from cloudrt.labels import Grid, Labels
from cloudrt.masks.metric import dice
from cloudrt.masks.rle import rle_to_submit_grid
from cloudrt.masks.table import read_table
from cloudrt.system.progress import progress_bar

from .results import save

OVERLAPS = (0.0, 0.125, 0.25, 0.375, 0.5)
ROWS, COLUMNS = 4, 8
"""Images of a mosaic."""
ALIGNED, SEAMS = 2, 1
"""Mosaics that are segmented as they are, and cropped mosaics whose steps are measured; each takes time."""
SIZES = {"12000x3000": (3000, 12000), "36000x3000": (3000, 36000)}
"""Height and width of the panoramas whose speed and memory are measured."""
COUNTS = {"12000x3000": 4, "36000x3000": 1}
"""How many of them are segmented in one run that is timed."""
JPEG_QUALITY = 90


@dataclass
class Known:
    """An image in a mosaic: its row and column, its masks alone, and its labels, if there are any, (C, H, W) each."""

    row: int
    column: int
    alone: NDArray[np.uint8]
    truth: NDArray[np.uint8] | None


@dataclass
class Agreement:
    """Dice of images in mosaics, and the largest steps, for one overlap."""

    pieces: list[float] = field(default_factory=list)
    labels: list[float] = field(default_factory=list)
    at_borders: int = 0
    elsewhere: int = 0
    tiles: int = 0


def masks(texts: Iterable[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Return masks as one array."""
    return np.stack(list(texts))


def known_images(
    segmenter: Segmenter, images: Sequence[Image], truths: Sequence[NDArray[np.uint8] | None]
) -> list[list[Known]]:
    """Return the images of each mosaic with their masks alone."""
    size, found = ROWS * COLUMNS, []
    results = list(segmenter.predict(list(images)))
    for begin in range(0, len(images) - size + 1, size):
        mosaic = []
        for number in range(size):
            result = results[begin + number]
            alone = masks(result.mask(name) for name in segmenter.labels.classes)
            mosaic.append(Known(number // COLUMNS, number % COLUMNS, alone, truths[begin + number]))
        found.append(mosaic)
    return found


def cut(grid: Grid, random: np.random.Generator | None) -> tuple[slice, slice]:
    """Return the rows and columns of a mosaic that are kept: all, or a random part without its sides."""
    kept = []
    for side, count in zip(grid, (ROWS, COLUMNS), strict=True):
        first, last = (0, 0) if random is None else random.uniform(0.15, 0.85, 2) * side
        kept.append(slice(int(first), count * side - int(last)))
    return kept[0], kept[1]


def blended(segmenter: Segmenter, panorama: Panorama, overlap: float) -> NDArray[np.uint8]:
    """Return the levels of a panorama, (C, W, H), without presence and gate."""
    grid, labels = panorama.place.grid, segmenter.labels
    blend = Blend(grid, labels.submit_grid, len(labels.classes), overlap, panorama.beyond)
    for tile, inferred in zip(
        panorama.tiles, segmenter.infer([panorama.cut(tile) for tile in panorama.tiles]), strict=True
    ):
        assert inferred.probability is not None
        blend.add(inferred.probability, tile.grid_x, tile.grid_y)
    return blend.finish()


def largest_steps(levels: NDArray[np.uint8], borders: set[int]) -> tuple[int, int]:
    """Return the largest step from one column to the next across the borders of tiles, and elsewhere."""
    steps = np.abs(np.diff(levels.astype(np.int16), axis=1)).max(axis=(0, 2))
    inside = [step for column, step in enumerate(steps, 1) if column not in borders]
    return max(int(steps[column - 1]) for column in borders), int(max(inside))


def compare(
    segmenter: Segmenter, images: Sequence[Image], known: Sequence[Sequence[Known]], *, cropped: bool
) -> list[Agreement]:
    """Segment the mosaics with each overlap, and compare each whole image."""
    labels, random = segmenter.labels, np.random.default_rng(0)
    height, width = labels.submit_grid
    found = [Agreement() for _ in OVERLAPS]
    with TemporaryDirectory() as folder, progress_bar("Mosaics", len(known) * len(OVERLAPS)) as advance:
        for number, mosaic in enumerate(known):
            some = images[number * ROWS * COLUMNS :][: ROWS * COLUMNS]
            lines = [np.hstack(some[row * COLUMNS : (row + 1) * COLUMNS]) for row in range(ROWS)]
            rows, columns = cut((height, width), random if cropped else None)
            picture = np.vstack(lines)[rows, columns]
            path = write_mosaic(Path(folder), picture, segmenter.artifact.field_of_view[1] // width)
            for overlap, agreement in zip(OVERLAPS, found, strict=True):
                tiling = Tiling(overlap)
                (result,) = predict_panoramas(segmenter, [ImageFile(path.name, path)], tiling)
                assert result.error is None, result.error
                whole = masks(result.mask(name) for name in labels.classes)
                for one in mosaic:
                    y, x = one.row * height - rows.start, one.column * width - columns.start
                    part = whole[:, max(y, 0) : y + height, max(x, 0) : x + width]
                    if min(y, x) < 0 or part.shape[1:] != (height, width):
                        continue
                    agreement.pieces += [dice(a, b) for a, b in zip(part, one.alone, strict=True)]
                    if one.truth is not None:
                        agreement.labels += [dice(a, b) for a, b in zip(part, one.truth, strict=True)]
                panorama = open_panorama(path, segmenter.artifact, tiling, 10**9)
                agreement.tiles += len(panorama.tiles)
                starts = {tile.grid_x for tile in panorama.tiles}
                borders = {at for start in starts for at in (start, start + width) if 0 < at < whole.shape[2]}
                # Edges of images are no seams; they are columns of the mosaic.
                borders -= {column * width - columns.start for column in range(COLUMNS + 1)}
                if borders and cropped and number < SEAMS:
                    at, elsewhere = largest_steps(blended(segmenter, panorama, overlap), borders)
                    agreement.at_borders = max(agreement.at_borders, at)
                    agreement.elsewhere = max(agreement.elsewhere, elsewhere)
                advance()
    return found


def write_mosaic(folder: Path, picture: Image, times: int) -> Path:
    """Write a mosaic whose name states a position at `times` less than 100 pixels per degree."""
    height, width = (side * times / 100 for side in picture.shape[:2])
    path = folder / f"mosaic_0-{width:g}_0-{height:g}.png"
    assert cv2.imwrite(str(path), picture[..., ::-1])
    return path


def read_truth(path: Path, keys: Iterable[str], labels: Labels) -> list[NDArray[np.uint8] | None]:
    """Return the masks of images on the submission grid, (C, H, W)."""
    table = read_table(path, labels)
    return [masks(rle_to_submit_grid(table.get((key, name), ""), labels) for name in labels.classes) for key in keys]


def measure_agreement(segmenter: Segmenter, folder: Path, truth: Path, scenes: int) -> dict[str, Any]:
    """Return the mean Dice of mosaics of labelled images and of scenes, for each overlap."""
    labels = segmenter.labels
    files = find_images(folder)
    real = [decode(file.path.read_bytes()) for file in files]
    truths = read_truth(truth, [file.key for file in files], labels)
    drawn = [draw_scene(seed, labels.submit_grid).image for seed in range(scenes)]
    found: dict[str, Any] = {}
    for name, images, masks_of in (("real", real, truths), ("synthetic", drawn, [None] * len(drawn))):
        known = known_images(segmenter, images, masks_of)
        every = [one for mosaic in known for one in mosaic]
        alone = [
            dice(a, b) for one in every if one.truth is not None for a, b in zip(one.alone, one.truth, strict=True)
        ]
        found[name] = {"images": len(every), "mosaics": len(known)}
        if alone:
            found[name]["labels_alone"] = float(np.mean(alone))
        for how in ("aligned", "cropped"):
            rows = []
            some = known if how == "cropped" else known[:ALIGNED]
            for overlap, one in zip(OVERLAPS, compare(segmenter, images, some, cropped=how == "cropped"), strict=True):
                row = {"overlap": overlap, "tiles": one.tiles, "images": len(one.pieces) // len(labels.classes)}
                row |= {"pieces": float(np.mean(one.pieces))}
                row |= {"labels": float(np.mean(one.labels))} if one.labels else {}
                row |= {"step_at_borders": one.at_borders, "step_elsewhere": one.elsewhere} if one.elsewhere else {}
                rows.append(row)
            found[name][how] = rows
    return found


def write_belt(path: Path, size: Grid) -> Path:
    """Write a panorama of repeated scenes."""
    scenes = [draw_scene(seed).image for seed in range(6)]
    height, width = scenes[0].shape[:2]
    columns = range(-(-size[1] // width))
    rows = [np.hstack([scenes[(3 * y + x) % 6] for x in columns]) for y in range(-(-size[0] // height))]
    write_jpeg(path, np.vstack(rows)[: size[0], : size[1]])
    return path


def write_jpeg(path: Path, image: Image) -> None:
    """Write a JPEG."""
    assert cv2.imwrite(str(path), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])


def write_tiles(folder: Path, belt: Path, panorama: Panorama, view: Grid) -> list[ImageFile]:
    """Write each tile as an image of its own."""
    folder.mkdir()
    image, files = decode(belt.read_bytes(), max_pixels=10**9), []
    for number, tile in enumerate(panorama.tiles):
        whole = np.zeros((*view, 3), np.uint8)
        part = image[tile.y : tile.y + view[0], tile.x : tile.x + view[1]]
        whole[: part.shape[0], : part.shape[1]] = part
        path = folder / f"{number:04}.jpg"
        write_jpeg(path, whole)
        files.append(ImageFile(path.name, path))
    return files


def timed(work: Callable[[], Iterable[Any]]) -> tuple[float, float]:
    """Return the seconds, and those of CPU time, to exhaust what `work` returns; nothing of it may have failed."""
    began, used = time.perf_counter(), time.process_time()
    assert all(one.error is None for one in work())
    return time.perf_counter() - began, time.process_time() - used


def median_ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    """Return the median over the rounds of the ratio of two durations."""
    return float(np.median(np.array(ones) / np.array(others)))


def measure_rate(segmenter: Segmenter, panoramas: Mapping[str, Path], rounds: int) -> dict[str, Any]:
    """Return the seconds of panoramas and of the same number of single images, in alternate rounds."""
    found: dict[str, Any] = {}
    for name, belt in panoramas.items():
        count = COUNTS[name]
        panorama = open_panorama(belt, segmenter.artifact, Tiling(), 10**9)
        singles = write_tiles(belt.with_suffix(""), belt, panorama, segmenter.artifact.field_of_view) * count
        belts = [ImageFile(belt.name, belt)] * count
        seconds: dict[str, list[float]] = {"tiles": [], "images": [], "tiles_cpu": [], "images_cpu": []}
        for number in range(rounds + 1):
            tiles = timed(lambda belts=belts: predict_panoramas(segmenter, belts, Tiling()))  # type: ignore[misc]
            alone = timed(lambda singles=singles: segmenter.predict(singles))  # type: ignore[misc]
            if number:  # the first round warms up
                for kind, value in zip(seconds, (tiles[0], alone[0], tiles[1], alone[1]), strict=True):
                    seconds[kind].append(value)
        found[name] = {
            "panoramas": count,
            "tiles": len(singles),
            "seconds": seconds,
            "tiles_per_s": len(singles) / float(np.median(seconds["tiles"])),
            "images_per_s": len(singles) / float(np.median(seconds["images"])),
            "ratio": median_ratio(seconds["images"], seconds["tiles"]),
            "cpu_ratio": median_ratio(seconds["images_cpu"], seconds["tiles_cpu"]),
        }
        click.echo(f"{name}: {found[name]}", err=True)
    return found


def measure_overlaps(segmenter: Segmenter, belt: Path, rounds: int) -> list[dict[str, Any]]:
    """Return the seconds of a panorama for each overlap, in alternate rounds."""
    seconds: list[list[float]] = [[] for _ in OVERLAPS]
    for number in range(rounds + 1):
        for overlap, found in zip(OVERLAPS, seconds, strict=True):
            file = ImageFile(belt.name, belt)
            took, _ = timed(lambda overlap=overlap, file=file: predict_panoramas(segmenter, [file], Tiling(overlap)))  # type: ignore[misc]
            if number:
                found.append(took)
    tiles = [count_tiles(segmenter, belt, overlap) for overlap in OVERLAPS]
    return [
        {"overlap": overlap, "tiles": count, "seconds": some, "median_s": float(np.median(some))}
        for overlap, count, some in zip(OVERLAPS, tiles, seconds, strict=True)
    ]


def count_tiles(segmenter: Segmenter, belt: Path, overlap: float) -> int:
    """Return the number of tiles of a panorama."""
    return len(open_panorama(belt, segmenter.artifact, Tiling(overlap), 10**9).tiles)


def peak_mb(belt: Path, count: int, output: Path) -> float:
    """Return the peak resident memory, in MB, of `cloudrt-infer --tile` on copies of a panorama."""
    names = []
    for number in range(count):
        name = belt.with_name(f"copy-{number}-{belt.name}")
        name.hardlink_to(belt)
        names.append(str(name))
    stats = output.with_suffix(".json")
    code = "from cloudrt.cli import infer; infer()"
    words = [*names, "--tile", "-o", str(output), "--overwrite", "-q", "--provider", "cpu", "--batch-size", "8"]
    subprocess.run([sys.executable, "-c", code, *words, "--stats", str(stats)], check=True)
    for path in names:
        Path(path).unlink()
    return float(json.loads(stats.read_text())["peak_memory_mb"])


PARTS = ("rate", "overlaps", "agreement", "memory")


@click.command()
@click.argument("images", type=click.Path(path_type=Path, exists=True))
@click.argument("truth", type=click.Path(path_type=Path, exists=True))
@click.option("--model", type=click.Path(path_type=Path, exists=True))
@click.option("--scenes", default=ROWS * COLUMNS, show_default=True, help="Number of synthetic scenes in mosaics.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="Measure this part alone, and keep the others.")
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    images: Path, truth: Path, model: Path | None, scenes: int, rounds: int, only: tuple[str, ...], output: Path | None
) -> None:
    """Measure tiles with labelled IMAGES, whose masks are in TRUTH, and with synthetic scenes."""
    command = f"python -m cloudrt.bench.studies.tiles IMAGES TRUTH.csv --scenes {scenes} --rounds {rounds}"
    kept = output is not None and output.exists() and bool(only)
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8")) if output and kept else {}
    found |= {"command": command, "default_overlap": OVERLAP}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        belts = {name: write_belt(folder / f"{name}.jpg", size) for name, size in SIZES.items()}
        if "memory" in (only or PARTS):
            found["peak_mb"] = {name: peak_mb(belt, 3, folder / "s.csv") for name, belt in belts.items()}
        with Segmenter(model) as segmenter:
            found["plan"] = segmenter.plan.describe()
            if "rate" in (only or PARTS):
                found["rate"] = measure_rate(segmenter, belts, rounds)
            if "overlaps" in (only or PARTS):
                found["overlaps"] = measure_overlaps(segmenter, belts["36000x3000"], rounds)
            found["belt_tiles"] = {f"{one:g}": count_tiles(segmenter, belts["36000x3000"], one) for one in OVERLAPS}
            if "agreement" in (only or PARTS):
                found["agreement"] = measure_agreement(segmenter, images, truth, scenes)
    found = {name: value for name, value in found.items() if name not in ("machine", "versions")}
    save(found, output)


if __name__ == "__main__":
    main()
