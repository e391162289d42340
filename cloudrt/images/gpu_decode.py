"""Decoding of JPEGs on an NVIDIA GPU with nvImageCodec; the only module that imports it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from cloudrt.errors import ProviderError
from cloudrt.images.image import Image
from cloudrt.system.nvidia import nvidia_driver

logger = logging.getLogger(__name__)

INSTALL = "pip install 'cloudrt[gpu-decode]'"


class GpuJpegDecoder:
    """Decodes batches of JPEGs at full size; not thread-safe.

    Parameters
    ----------
    device
        GPU number.
    threads
        Number of CPU threads for the parts that the GPU does not do.
    on_cpu
        Decode on the CPU with the same library, for tests without a GPU.

    Raises
    ------
    ProviderError
        nvImageCodec or a GPU is missing.
    """

    def __init__(self, device: int = 0, threads: int = 1, *, on_cpu: bool = False) -> None:
        if find_spec("nvidia") is None or find_spec("nvidia.nvimgcodec") is None:
            raise ProviderError(f"--decoder gpu cannot run here: nvImageCodec is not installed: {INSTALL}")
        driver = nvidia_driver()
        if not on_cpu and (driver is None or not driver.gpus):
            raise ProviderError("--decoder gpu cannot run here: no NVIDIA GPU, or no driver: use --decoder cpu")
        from nvidia import nvimgcodec

        self._codec = nvimgcodec
        # Without nvJPEG the library would silently decode on the CPU: allow only backends that use the GPU.
        kinds = (
            [nvimgcodec.CPU_ONLY]
            if on_cpu
            else [nvimgcodec.HW_GPU_ONLY, nvimgcodec.GPU_ONLY, nvimgcodec.HYBRID_CPU_GPU]
        )
        self._decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY if on_cpu else device,
            max_num_cpu_threads=threads,
            backends=[nvimgcodec.Backend(kind) for kind in kinds],
        )
        # No rotation, like libjpeg-turbo: JPEGs with EXIF data are decoded on the CPU.
        self._params = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.SRGB)

    def decode(self, files: Sequence[bytes]) -> list[Image | None]:
        """Return each JPEG as (H, W, 3) uint8 RGB in host memory, or None if it could not be decoded."""
        streams = [self._codec.CodeStream(data) for data in files]
        return [_to_host(image) for image in self._decoder.decode(streams, params=self._params)]


def _to_host(image: Any) -> Image | None:
    if image is None:
        return None
    array = np.asarray(image.cpu())
    return array if array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8 else None
