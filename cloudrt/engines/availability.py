"""What stands against a provider on this machine, found without opening a session.

ONNX Runtime lists CUDA and TensorRT wherever its GPU build is installed, logs two loud lines when they cannot load, and
then runs on the CPU: so look before asking.
"""

from __future__ import annotations

import ctypes
import sys
from importlib.util import find_spec

from cloudrt.errors import ProviderError


def problem(provider: str) -> str | None:  # noqa: PLR0911 - a return for each obstacle
    """Return why `provider` cannot run here, ending with what to install, or None where nothing stands against it.

    Raises
    ------
    ProviderError
        No provider of that name.
    """
    if provider == "cpu":
        return None
    if provider == "openvino":
        return None if find_spec("openvino") else "OpenVINO is not installed: pip install 'cloudrt[openvino]'"
    if provider not in ("cuda", "tensorrt"):
        raise ProviderError(f"no provider named {provider!r}")
    if not _has_driver():
        return "no NVIDIA GPU, or no driver: install NVIDIA's driver, and start a container with --gpus all"
    extra = provider
    if not find_spec("nvidia") or not (find_spec("nvidia.cudnn") or find_spec("torch")):
        return f"CUDA and cuDNN are not installed: pip install 'cloudrt[{extra}]'"
    if provider == "tensorrt" and not find_spec("tensorrt"):
        return "TensorRT is not installed: pip install 'cloudrt[tensorrt]'"
    import onnxruntime

    name = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}[provider]
    if name not in onnxruntime.get_available_providers():
        return "this onnxruntime has no GPU build: pip uninstall onnxruntime && pip install onnxruntime-gpu"
    return None


def _has_driver() -> bool:
    """Whether NVIDIA's driver can be loaded and counts at least one GPU."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
