"""TensorRT for RTX as a plugin of ONNX Runtime: registration, the choice of a device, and the options of the provider.

The plugin contains its own TensorRT, and compiles a network in seconds when a session opens. It supports GPUs of
compute capability 8.6, 8.9, and 12.0 or later, but not data-centre GPUs such as A100 (8.0) and H100 (9.0).
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

from cloudrt.engines.base import DIAGNOSIS, brief
from cloudrt.engines.tensorrt import engine_key, profile_options
from cloudrt.errors import ProviderError
from cloudrt.model.artifact import Artifact
from cloudrt.system.cache import open_entry
from cloudrt.system.nvidia import nvidia_driver
from cloudrt.system.versions import install_command

MODULE = "onnxruntime_ep_nv_tensorrt_rtx"
PACKAGES = ("onnxruntime-ep-nv-tensorrt-rtx-cu13", "onnxruntime-ep-nv-tensorrt-rtx")
CUDA_MAJOR = 13
EP_NAME = "NvTensorRTRTXExecutionProvider"
SUPPORTED = "8.6, 8.9, or 12.0 and later"
"""The supported compute capabilities, for messages."""
INSTALL = install_command("tensorrt-rtx")


def supports(capability: tuple[int, int]) -> bool:
    """Return whether the plugin supports a compute capability, given as major and minor number."""
    return capability in ((8, 6), (8, 9)) or capability >= (12, 0)


@cache
def register() -> None:
    """Load the plugin and register it with ONNX Runtime, once per process.

    Raises
    ------
    ProviderError
        The plugin is not installed, or the plugin or a library that it needs cannot be loaded.
    """
    import onnxruntime

    try:
        import onnxruntime_ep_nv_tensorrt_rtx as plugin
    except ImportError as error:
        raise ProviderError(f"TensorRT for RTX is not installed: {INSTALL}") from error
    try:
        # The wheel bundles the CUDA runtime under a name that the dynamic loader does not search for.
        for bundled in Path(plugin.__file__).parent.glob("libcudart.so.*"):
            ctypes.CDLL(str(bundled))
        onnxruntime.register_execution_provider_library(EP_NAME, plugin.get_library_path())
    except Exception as error:
        # The exceptions of ONNX Runtime have no common base class below Exception.
        raise ProviderError(f"the plugin of TensorRT for RTX cannot be loaded: {brief(error)}: {DIAGNOSIS}") from error


def find_device(number: int) -> Any:
    """Register the plugin, and return ONNX Runtime's handle of a GPU.

    Raises
    ------
    ProviderError
        The plugin cannot be loaded, or does not support this GPU.
    """
    import onnxruntime

    driver = nvidia_driver()
    capabilities = driver.capabilities if driver else ()
    if driver and number < len(capabilities) and not supports(capabilities[number]):
        major, minor = capabilities[number]
        raise ProviderError(
            f"GPU {number}, {driver.gpus[number]}, has compute capability {major}.{minor}, but TensorRT for RTX needs "
            f"{SUPPORTED}: use provider cuda or tensorrt"
        )
    register()
    found = [device for device in onnxruntime.get_ep_devices() if device.ep_name == EP_NAME]
    position = sum(map(supports, capabilities[:number]))  # the plugin lists only the GPUs that it supports
    if position >= len(found):
        raise ProviderError(f"TensorRT for RTX finds {len(found)} GPUs, but not GPU {number}: {DIAGNOSIS}")
    return found[position]


def plugin_options(
    artifact: Artifact, batch_size: int | None, content: bytes, device: int, graph: bool
) -> dict[str, str]:
    """Return the options of the provider: shapes of the profile, cache folder of compiled kernels, and CUDA graph."""
    options = profile_options("nv", artifact, batch_size)
    folder = open_entry("tensorrt-rtx", engine_key(artifact, content, options, device, PACKAGES).folder())
    cached = {"nv_runtime_cache_path": str(folder)} if folder else {}
    return {"enable_cuda_graph": str(int(graph))} | options | cached
