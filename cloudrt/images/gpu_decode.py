"""Decoding of JPEGs on an NVIDIA GPU with nvImageCodec; the only module that imports it.

Decoded images stay on the GPU; `cloudrt.engines.gpu_images` resizes them there.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from cloudrt.errors import ProviderError
from cloudrt.system.cuda import DeviceArray
from cloudrt.system.nvidia import nvidia_driver
from cloudrt.system.versions import install_command

INSTALL = install_command("gpu-decode")
BACKENDS = ("hardware", "hybrid")
"""The GPU's JPEG engine ("hardware"), and CUDA cores with Huffman decoding by the CPU or the GPU ("hybrid").

The JPEG engine decodes all images of a batch that it supports, and CUDA cores decode the others. On an H200, splitting
each batch between both had 0.73 times the rate of the JPEG engine alone for JPEGs of 525x350, and 0.80 times for
2100x1400.
"""


class GpuJpegDecoder:
    """Decodes batches of JPEGs at full size; not thread-safe.

    Parameters
    ----------
    device
        GPU number.
    threads
        Number of usable CPU threads; nvImageCodec gets one fewer, and at least one.
    backends
        The backends to use, of `BACKENDS`. They are named because nvImageCodec, by default, decodes on the CPU if
        nvJPEG is missing.
    on_cpu
        Decode with nvImageCodec's CPU backend instead, for tests without a GPU.

    Raises
    ------
    ProviderError
        nvImageCodec or a GPU is missing.
    """

    def __init__(
        self, device: int = 0, threads: int = 1, *, backends: Sequence[str] = BACKENDS, on_cpu: bool = False
    ) -> None:
        if find_spec("nvidia") is None or find_spec("nvidia.nvimgcodec") is None:
            raise ProviderError(f"decoder gpu cannot run here: nvImageCodec is not installed: {INSTALL}")
        driver = nvidia_driver()
        if not on_cpu and (driver is None or not driver.gpus):
            raise ProviderError("decoder gpu cannot run here: no NVIDIA GPU, or no driver: use `decoder='cpu'`")
        from nvidia import nvimgcodec

        self._codec = nvimgcodec
        kinds = {
            "hardware": nvimgcodec.HW_GPU_ONLY,
            "hybrid": nvimgcodec.HYBRID_CPU_GPU,
            "cpu": nvimgcodec.CPU_ONLY,
        }
        chosen = ("cpu",) if on_cpu else tuple(backends)
        self._decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY if on_cpu else device,
            max_num_cpu_threads=max(1, threads - 1),  # with all cores, it prints a warning
            backends=[nvimgcodec.Backend(kinds[name]) for name in chosen],
        )
        # No rotation, like libjpeg-turbo: JPEGs with EXIF data are decoded on the CPU.
        self._params = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.SRGB)

    def decode(self, files: Sequence[bytes], stream: int = 0) -> list[DecodedJpeg | None]:
        """Return each decoded JPEG, (H, W, 3) on the device, or None if it could not be decoded.

        Decoding is asynchronous: synchronise `stream`, a CUDA stream, before the images are used.
        """
        streams = [self._codec.CodeStream(data) for data in files]
        return [_describe(one) for one in self._decoder.decode(streams, params=self._params, cuda_stream=stream)]


class DecodedJpeg(DeviceArray):
    """A decoded image, (H, W, 3) uint8 RGB; `owner` is nvImageCodec's image object, which owns the memory."""

    def __init__(self, address: int, shape: tuple[int, ...], owner: Any) -> None:
        super().__init__(address, shape)
        self.owner = owner


def _describe(image: Any) -> DecodedJpeg | None:
    if image is None:
        return None
    on_host = "HOST" in str(image.buffer_kind)
    memory = image.__array_interface__ if on_host else image.__cuda_array_interface__
    shape, strides = tuple(memory["shape"]), memory.get("strides")
    if len(shape) != 3 or shape[2] != 3 or memory["typestr"] != "|u1" or strides not in (None, (3 * shape[1], 3, 1)):
        return None
    return DecodedJpeg(memory["data"][0], shape, image)
