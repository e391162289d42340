"""Samples from the cache, augmented: (3, H, W) float32 normalised image and (C, H, W) float32 mask."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from cloudrt.labels import Grid
from cloudrt.network import NetworkConfig
from cloudrt.search import unpack_mask

from .cache import DatasetCache


def augmentation() -> Any:
    """The notebook's augmentation: flips, shift-scale with a zero border, grid distortion, at its probabilities."""
    import albumentations

    return albumentations.Compose(
        [
            albumentations.HorizontalFlip(p=0.25),
            albumentations.VerticalFlip(p=0.25),
            # ShiftScaleRotate(scale 0.5, rotate 0, shift 0.1): albumentations 2 says it through Affine.
            albumentations.Affine(
                scale=(0.5, 1.5),
                translate_percent=(-0.1, 0.1),
                rotate=0,
                keep_ratio=True,
                border_mode=cv2.BORDER_CONSTANT,
                fill=0,
                fill_mask=0,
                p=0.5,
            ),
            albumentations.GridDistortion(p=0.25),
        ]
    )


class CloudDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The images of the cache at `positions`.

    Each sample's augmentation is seeded by (seed, epoch, position): the same on any number of workers.
    """

    def __init__(
        self, cache: DatasetCache, positions: NDArray[np.int_], config: NetworkConfig, augment: bool, seed: int
    ) -> None:
        self.cache = cache
        self.positions = positions
        self.grid: Grid = config.labels.submit_grid
        self.size: Grid = config.input_size
        self.mean = np.asarray(config.mean, np.float32)
        self.scale = 1 / np.asarray(config.std, np.float32)
        self.transform = augmentation() if augment else None
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        position = int(self.positions[index])
        image = np.asarray(self.cache.images[position])
        mask = self._mask(position)
        if self.transform is not None:
            state = np.random.SeedSequence((self.seed, self.epoch, position)).generate_state(1)
            self.transform.set_random_seed(int(state[0]))
            changed = self.transform(image=image, mask=mask)
            image, mask = changed["image"], changed["mask"]
        pixels = (image.astype(np.float32) - self.mean) * self.scale
        planes = np.ascontiguousarray(mask.transpose(2, 0, 1), np.float32)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), torch.from_numpy(planes)

    def _mask(self, position: int) -> NDArray[np.uint8]:
        """Return the truth at the input size: (H, W, C) uint8 of 0 and 1."""
        height, width = self.size
        planes = [
            cv2.resize(
                np.ascontiguousarray(unpack_mask(bits, self.grid)), (width, height), interpolation=cv2.INTER_NEAREST
            )
            for bits in self.cache.truth[position]
        ]
        return np.stack(planes, axis=2).astype(np.uint8)
