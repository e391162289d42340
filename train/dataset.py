"""Samples from the cache, augmented: (3, H, W) float32 normalised image and (C, H, W) float32 mask."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from cloudrt.labels import Grid
from cloudrt.network import NetworkConfig
from cloudrt.search import unpack_mask

from .augment import build_augmentation
from .cache import DatasetCache


class CloudDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The images of the cache at `positions`.

    Each sample's augmentation is seeded by (seed, epoch, position): the same on any number of workers.
    """

    def __init__(
        self, cache: DatasetCache, positions: NDArray[np.int_], config: NetworkConfig, augment: str, seed: int
    ) -> None:
        self.cache = cache
        self.positions = positions
        self.grid: Grid = config.labels.submit_grid
        self.size: Grid = config.input_size
        self.mean = np.asarray(config.mean, np.float32)
        self.scale = 1 / np.asarray(config.std, np.float32)
        self.transform = build_augmentation(augment)
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


class EpochBatches(Sampler[list[int]]):
    """The batches of an epoch: a shuffle seeded by (seed, epoch), cut into batches that the processes share out.

    Process r of R takes the r-th part of each batch of R * `batch_size` images, so that R processes see what one with
    the larger batch would. A rest that fills no batch is left out of this epoch.

    Parameters
    ----------
    images
        How many there are.
    batch_size
        Of each process.
    rank, world
        This process's number, and how many there are.
    """

    def __init__(self, images: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.images, self.seed, self.rank, self.world = images, seed, rank, world
        self.batch_size = max(1, min(batch_size, images // world))
        self.epoch = 0

    def __len__(self) -> int:
        return max(1, self.images // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.images)
        together = self.batch_size * self.world
        for step in range(len(self)):
            begin = step * together + self.rank * self.batch_size
            yield order[begin : begin + self.batch_size].tolist()
