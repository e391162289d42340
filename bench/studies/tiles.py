"""Tiles: the overlap that agrees best with known images, steps at borders, and speed and memory of panoramas.

    python -m cloudrt.bench.studies.tiles IMAGES TRUTH.csv -o FILE.json

IMAGES are labelled images of the submission grid's size that the network was not trained on, with their masks in
TRUTH.csv. Mosaics of them, at a quarter of the training resolution, are segmented as panoramas: as they are, where
many tiles begin at or near the edge of an image, and cropped by a random part of an image on each side. The masks of
each whole image are compared with those of the image alone, and with the labels; the same is done with synthetic
scenes, without labels. A step is the difference in level of two neighbouring columns.

Speed and memory are measured on synthetic panoramas. To compare the speed, each tile is also written as a JPEG of its
own, of the same quality; panoramas and single images are timed alternately.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

from cloudrt.data.scenes import draw_scene
from cloudrt.data.synth import write_jpeg
from cloudrt.geo.tiles import Panorama, open_panorama
from cloudrt.geo.tiling import OVERLAP, Tiling
from cloudrt.images.image import ImageFile, decode
from cloudrt.inference.panoramas import predict_panoramas
from cloudrt.inference.pipeline import Segmenter
from cloudrt.labels import Grid

from .mosaics import COLUMNS, OVERLAPS, ROWS, measure_agreement
from .results import save

SIZES = {"12000x3000": (3000, 12000), "36000x3000": (3000, 36000)}
"""Height and width of the panoramas whose speed and memory are measured."""
RUNS = (("12000x3000", 4), ("36000x3000", 1), ("36000x3000", 3))
"""Panoramas of each run that is timed: size and number."""
JPEG_QUALITY = 90


def write_belt(path: Path, size: Grid) -> Path:
    """Write a panorama of repeated scenes."""
    scenes = [draw_scene(seed).image for seed in range(6)]
    height, width = scenes[0].shape[:2]
    columns = range(-(-size[1] // width))
    rows = [np.hstack([scenes[(3 * y + x) % 6] for x in columns]) for y in range(-(-size[0] // height))]
    write_jpeg(path, np.vstack(rows)[: size[0], : size[1]], JPEG_QUALITY)
    return path


def write_tiles(folder: Path, belt: Path, panorama: Panorama, view: Grid) -> list[ImageFile]:
    """Write each tile as an image of its own."""
    folder.mkdir()
    image, files = decode(belt.read_bytes(), max_pixels=10**9), []
    for number, tile in enumerate(panorama.tiles):
        whole = np.zeros((*view, 3), np.uint8)
        part = image[tile.y : tile.y + view[0], tile.x : tile.x + view[1]]
        whole[: part.shape[0], : part.shape[1]] = part
        path = folder / f"{number:04}.jpg"
        write_jpeg(path, whole, JPEG_QUALITY)
        files.append(ImageFile(path.name, path))
    return files


def timed(work: Callable[[], Iterable[Any]]) -> tuple[float, float]:
    """Return the seconds and the CPU seconds to iterate over the results of `work`, none of which may have failed."""
    began, used = time.perf_counter(), time.process_time()
    assert all(one.error is None for one in work())
    return time.perf_counter() - began, time.process_time() - used


def median_ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    """Return the median over the rounds of the ratio of two durations."""
    return float(np.median(np.array(ones) / np.array(others)))


def measure_rate(segmenter: Segmenter, panoramas: Mapping[str, Path], rounds: int) -> list[dict[str, Any]]:
    """Return the seconds of panoramas and of the same number of single images, in alternating rounds."""
    tiles: dict[str, list[ImageFile]] = {}
    for name, belt in panoramas.items():
        panorama = open_panorama(belt, segmenter.artifact, Tiling(), 10**9)
        tiles[name] = write_tiles(belt.with_suffix(""), belt, panorama, segmenter.artifact.field_of_view)
    found = []
    for name, count in RUNS:
        singles, belts = tiles[name] * count, [ImageFile(name, panoramas[name])] * count
        seconds: dict[str, list[float]] = {"tiles": [], "images": [], "tiles_cpu": [], "images_cpu": []}
        for number in range(rounds + 1):
            whole = timed(lambda belts=belts: predict_panoramas(segmenter, belts, Tiling()))  # type: ignore[misc]
            alone = timed(lambda singles=singles: segmenter.predict(singles))  # type: ignore[misc]
            if number:  # the first round warms up
                for kind, value in zip(seconds, (whole[0], alone[0], whole[1], alone[1]), strict=True):
                    seconds[kind].append(value)
        one = {
            "size": name,
            "panoramas": count,
            "tiles": len(singles),
            "seconds": seconds,
            "tiles_per_s": len(singles) / float(np.median(seconds["tiles"])),
            "images_per_s": len(singles) / float(np.median(seconds["images"])),
            "ratio": median_ratio(seconds["images"], seconds["tiles"]),
            "cpu_ratio": median_ratio(seconds["images_cpu"], seconds["tiles_cpu"]),
        }
        click.echo(one, err=True)
        found.append(one)
    return found


def measure_overlaps(segmenter: Segmenter, belt: Path, rounds: int) -> list[dict[str, Any]]:
    """Return the seconds of a panorama for each overlap, in alternating rounds."""
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
