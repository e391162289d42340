"""TensorRT for RTX, as a plugin of ONNX Runtime: registration, the choice of a device, and the provider's options.

The plugin brings its own TensorRT and compiles a network in seconds, when a session opens. It runs on GPUs of compute
capability 8.6, 8.9 and 12.0 upwards, which data-centre GPUs such as A100 and H100 are not.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

from cloudrt.engines.tensorrt import engine_key, profile_options
from cloudrt.errors import ProviderError
from cloudrt.model.artifact import Artifact
from cloudrt.system.cache import open_entry
from cloudrt.system.nvidia import nvidia_driver

MODULE = "onnxruntime_ep_nv_tensorrt_rtx"
PACKAGES = ("onnxruntime-ep-nv-tensorrt-rtx-cu13", "onnxruntime-ep-nv-tensorrt-rtx")
CUDA_MAJOR = 13
EP_NAME = "NvTensorRTRTXExecutionProvider"
SUPPORTED = "8.6, 8.9, and 12.0 or later"
"""Compute capabilities, in words."""
INSTALL = "pip install 'cloudrt[tensorrt-rtx]'"


def supports(capability: tuple[int, int]) -> bool:
    """Whether the plugin runs on GPUs of this compute capability, major and minor number."""
    return capability in ((8, 6), (8, 9)) or capability >= (12, 0)


@cache
def register() -> None:
    """Load the plugin and register it with ONNX Runtime, once per process.

    Raises
    ------
    ProviderError
        The plugin is not installed, or it or a library that it needs does not load.
    """
    import onnxruntime

    try:
        import onnxruntime_ep_nv_tensorrt_rtx as plugin
    except ImportError as error:
        raise ProviderError(f"TensorRT for RTX is not installed: {INSTALL}") from error
    try:
        # The wheel bundles the CUDA runtime under a name that the loader does not look for.
        for bundled in Path(plugin.__file__).parent.glob("libcudart.so.*"):
            ctypes.CDLL(str(bundled))
        onnxruntime.register_execution_provider_library(EP_NAME, plugin.get_library_path())
    except Exception as error:
        # ONNX Runtime's exceptions share no base below Exception.
        line = str(error).splitlines()[0]
        raise ProviderError(f"the plugin of TensorRT for RTX does not load: {line}: cloudrt doctor") from error


def find_device(number: int) -> Any:
    """Return ONNX Runtime's handle of GPU `number`, with the plugin registered.

    Raises
    ------
    ProviderError
        The plugin does not load, or does not support this GPU.
    """
    import onnxruntime

    driver = nvidia_driver()
    capabilities = driver.capabilities if driver else ()
    if driver and number < len(capabilities) and not supports(capabilities[number]):
        major, minor = capabilities[number]
        raise ProviderError(
            f"GPU {number}, {driver.gpus[number]}, has compute capability {major}.{minor}, and TensorRT for RTX needs "
            f"{SUPPORTED}: use --provider cuda or tensorrt"
        )
    register()
    found = [device for device in onnxruntime.get_ep_devices() if device.ep_name == EP_NAME]
    position = sum(map(supports, capabilities[:number]))  # the plugin lists those that it supports
    if position >= len(found):
        raise ProviderError(f"TensorRT for RTX finds {len(found)} GPUs, and GPU {number} was asked for: cloudrt doctor")
    return found[position]


def plugin_options(
    artifact: Artifact, batch_size: int | None, content: bytes, device: int, graph: bool
) -> dict[str, str]:
    """Return the options of the provider: the shapes, the folder of compiled kernels, and the CUDA graph."""
    options = profile_options("nv", artifact, batch_size)
    folder = open_entry("tensorrt-rtx", engine_key(artifact, content, options, device, PACKAGES).folder())
    cached = {"nv_runtime_cache_path": str(folder)} if folder else {}
    return {"enable_cuda_graph": str(int(graph))} | options | cached
