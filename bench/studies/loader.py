"""Samples per second of the cached loader and of the notebook's loader, with the same images and augmentation.

    python -m cloudrt.bench.studies.loader DATA -o FILE.json [--samples 96] [--input-size 640 320]

For every sample, the notebook reads the whole image, decodes each mask to float32 on the label grid, and resizes both
with albumentations. Both loaders use one thread; `cpu_time_ratio` compares CPU seconds, which other processes on the
machine do not affect. Before timing, the samples without augmentation are compared.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import torch
from cloudrt.train.augment import build_augmentation
from cloudrt.train.cache import open_cache
from cloudrt.train.dataset import CloudDataset, Feed
from torch.utils.data import DataLoader, Dataset

from cloudrt.data.folder import DataFolder, open_data
from cloudrt.images.image import decode, read_file
from cloudrt.labels import Grid
from cloudrt.model.network_config import NetworkConfig

from .results import save

BATCH = 6
"""Batch size of the notebook."""


class NotebookDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples from files and rows: normalised image (3, H, W) float32, mask (C, H, W) float32."""

    def __init__(self, data: DataFolder, names: list[str], config: NetworkConfig, augment: str) -> None:
        import albumentations

        self.data, self.names, self.config = data, names, config
        self.rows = data.read_train()
        steps = [albumentations.Resize(*config.input_size)]
        augmentation = build_augmentation(augment)
        self.transform = albumentations.Compose([*steps, *(augmentation.transforms if augmentation else [])])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        name, labels = self.names[index], self.config.labels
        height, width = labels.label_grid
        masks = np.zeros((height, width, len(labels.classes)), np.float32)
        for plane, label in enumerate(labels.classes):
            flat = np.zeros(height * width, np.uint8)
            numbers = np.asarray(self.rows[name].get(label, "").split(), dtype=int)
            for start, length in zip(numbers[::2], numbers[1::2], strict=True):
                flat[start - 1 : start - 1 + length] = 1
            masks[:, :, plane] = flat.reshape(width, height).T
        read = cv2.imread(str(self.data.train_images / name))
        assert read is not None  # open_cache could read it
        image = np.ascontiguousarray(read[..., ::-1])
        image = cv2.resize(image, (width, height)) if image.shape[:2] != (height, width) else image
        changed = self.transform(image=image, mask=masks)
        pixels = (changed["image"] - np.array(self.config.mean)) / np.array(self.config.std)
        return (
            torch.from_numpy(pixels.transpose(2, 0, 1).astype("float32")),
            torch.from_numpy(changed["mask"].transpose(2, 0, 1).astype("float32")),
        )


def compare(data: DataFolder, input_size: Grid, augment: str, samples: int, rounds: int) -> dict[str, Any]:
    """Return the differences without augmentation, and samples per second with augmentation, alternating."""
    config = NetworkConfig(input_size=input_size, labels=data.labels)
    feed = Feed(config, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        cache = open_cache(data, input_size, Path(folder), samples)
        caching = time.perf_counter() - began
        names = [name for name in cache.names if name not in cache.failures]
        positions = np.array([cache.names.index(name) for name in names])

        def ours(preset: str) -> CloudDataset:
            return CloudDataset(cache, positions, config, preset, 0)

        differences = []
        for sample, (plain_image, plain_mask) in zip(
            iter(DataLoader(ours("none"))), DataLoader(NotebookDataset(data, names, config, "none")), strict=True
        ):
            image, mask = feed(*sample)
            pixels = float((image - plain_image).abs().mean() * np.mean(config.std))
            differences.append((pixels, float((mask != (plain_mask >= 0.5)).float().mean())))
        ways: dict[str, tuple[Callable[[], Dataset[Any]], Callable[..., Any]]] = {
            "cloudrt": (lambda: ours(augment), feed),
            "notebook": (lambda: NotebookDataset(data, names, config, augment), lambda image, mask: (image, mask)),
        }
        rates: dict[str, list[float]] = {way: [] for way in ways}
        worked_rates: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds + 1):  # the first warms up
            for way, (make, ready) in ways.items():
                loader = DataLoader(make(), batch_size=BATCH, num_workers=0)
                began, worked = time.perf_counter(), time.process_time()
                count = sum(len(ready(*batch)[0]) for batch in loader)
                rates[way].append(count / (time.perf_counter() - began))
                worked_rates[way].append(count / (time.process_time() - worked))
    ratios = [a / b for a, b in zip(rates["cloudrt"][1:], rates["notebook"][1:], strict=True)]
    worked_ratios = [a / b for a, b in zip(worked_rates["cloudrt"][1:], worked_rates["notebook"][1:], strict=True)]
    image_size = decode(read_file(data.train_images / names[0])).shape[:2]
    return {
        "samples": len(names),
        "image_size": list(image_size),
        "input_size": list(input_size),
        "augment": augment,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "cpu_time_ratio": statistics.median(worked_ratios),
        "cpu_time_ratios": worked_ratios,
        "samples_per_second": {way: statistics.median(values[1:]) for way, values in rates.items()},
        "seconds_to_cache": caching,
        "mean_pixel_difference": float(np.mean([one[0] for one in differences])),
        "mask_difference": float(np.mean([one[1] for one in differences])),
    }


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path))
@click.option("--samples", default=96, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option(
    "--input-size", "size", nargs=2, type=int, default=(640, 320), show_default=True, help="Width and height."
)
@click.option("--augment", default="notebook", show_default=True)
def main(data: Path, output: Path | None, samples: int, rounds: int, size: Grid, augment: str) -> None:
    """Compare the two loaders on the first images of DATA."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    found = compare(open_data(data), size[::-1], augment, samples, rounds)
    save(found, output)


if __name__ == "__main__":
    main()
