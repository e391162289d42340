"""Augmented samples from the cache, and their batches as the network's input.

Samples are uint8: image (H, W, 3), mask (C, H, W) and, with a teacher, its levels (C, H, W) and presence (C,). `Feed`
copies them to the device as uint8, a quarter of the bytes of float32, and normalises the images there. Images are
channels-last, as the network is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from cloudrt.labels import Grid
from cloudrt.model.network_config import NetworkConfig

from .augment import build_augmentation
from .cache import DatasetCache
from .teacher import Teacher


class CloudDataset(Dataset[tuple[torch.Tensor, ...]]):
    """The images of the cache at `positions`, augmented.

    The augmentation of a sample is seeded by (seed, epoch, position), so that it does not depend on the workers. With a
    teacher, its maps are augmented like the mask.
    """

    def __init__(
        self,
        cache: DatasetCache,
        positions: NDArray[np.int_],
        config: NetworkConfig,
        augment: str,
        seed: int,
        teacher: Teacher | None = None,
    ) -> None:
        self.cache, self.config = cache, config
        self.positions = positions
        self.grid: Grid = config.labels.submit_grid
        self.size: Grid = config.input_size
        self.transform = build_augmentation(augment)
        self.seed = seed
        self.teacher = teacher
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        position = int(self.positions[index])
        image = np.asarray(self.cache.images[position])
        mask = self._mask(position)
        classes = mask.shape[2]
        if self.teacher is not None:
            levels, presence = self.teacher.read(self.cache.names[position])
            mask = np.concatenate([mask, levels], axis=2)
        if self.transform is not None:
            state = np.random.SeedSequence((self.seed, self.epoch, position)).generate_state(1)
            self.transform.set_random_seed(int(state[0]))
            changed = self.transform(image=image, mask=mask)
            image, mask = changed["image"], changed["mask"]
        planes = torch.from_numpy(np.stack(cv2.split(np.ascontiguousarray(mask))))
        sample = torch.from_numpy(np.array(image)), planes[:classes]
        return sample if self.teacher is None else (*sample, planes[classes:], torch.from_numpy(presence))

    def _mask(self, position: int) -> NDArray[np.uint8]:
        """Return the truth at the input size, (H, W, C) uint8, 0 or 1."""
        (rows, columns), (height, width) = self.grid, self.size
        planes: list[NDArray[Any]] = [np.zeros((height, width), np.uint8)] * len(self.cache.truth[position])
        for index, packed in enumerate(self.cache.truth[position]):
            if packed.any():  # about half are empty
                bits = np.unpackbits(packed, count=rows * columns).reshape(columns, rows)
                # `bits` is (W, H). Transposing after resizing is allowed: the nearest neighbours are the same.
                planes[index] = cv2.transpose(cv2.resize(bits, (height, width), interpolation=cv2.INTER_NEAREST))
        mask = np.asarray(cv2.merge(planes), np.uint8)
        return mask.reshape(height, width, len(planes))  # cv2.merge of one plane is two-dimensional


class Feed:
    """Copies batches of samples to the device and normalises them there.

    Parameters
    ----------
    config
        Contains mean and standard deviation.
    device
        Device of the network.
    """

    def __init__(self, config: NetworkConfig, device: torch.device) -> None:
        self.device = device
        width = config.input_size[1]  # normalise whole rows: broadcasting three numbers is slow
        self.mean = torch.tensor(config.mean, device=device).repeat(width)
        self.scale = 1 / torch.tensor(config.std, device=device).repeat(width)
        self._buffers: dict[str, torch.Tensor] = {}

    def __call__(self, image: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a batch on the device; the tensors are valid until the next call.

        Parameters
        ----------
        image
            (N, H, W, 3) uint8.
        mask
            (N, C, H, W) uint8.

        Returns
        -------
        pixels
            (N, 3, H, W) float32, normalised, channels last.
        truth
            (N, C, H, W) float32.
        """
        rows = image.to(self.device, non_blocking=True).flatten(2)
        pixels = torch.sub(rows, self.mean, out=self._buffer("pixels", rows.shape)).mul_(self.scale)
        truth = self._buffer("truth", mask.shape).copy_(mask.to(self.device, non_blocking=True))
        return pixels.reshape(image.shape).permute(0, 3, 1, 2), truth

    def _buffer(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Return the buffer of the previous batch: on a CPU, page faults of new memory dominate."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != shape:
            buffer = self._buffers[name] = torch.empty(shape, device=self.device)
        return buffer


class EpochBatches(Sampler[list[int]]):
    """The batches of an epoch, from a shuffle seeded by (seed, epoch), divided among the processes.

    Rank r of R takes the r-th part of each batch of R * `batch_size` images, so that R processes get the same images as
    one process with the larger batch. An incomplete last batch is dropped.

    Parameters
    ----------
    images
        Number of images.
    batch_size
        Images per batch and process; at most `images // world_size` are used.
    seed
        Seed of the shuffle.
    rank, world_size
        Rank of this process and number of processes.
    """

    def __init__(self, images: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.images, self.seed, self.rank, self.world_size = images, seed, rank, world_size
        self.batch_size = max(1, min(batch_size, images // world_size))
        self.epoch = 0

    def __len__(self) -> int:
        return max(1, self.images // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.images)
        together = self.batch_size * self.world_size
        for step in range(len(self)):
            begin = step * together + self.rank * self.batch_size
            yield order[begin : begin + self.batch_size].tolist()
