"""Checks of whether a provider can run on this machine, without opening a session.

If its GPU build is installed, ONNX Runtime lists CUDA and TensorRT as available even where they cannot load; opening a
session then logs errors and uses the CPU. The checks run cheapest first and stop at the first obstacle: driver, GPU,
ONNX Runtime's build, the driver's CUDA version, CUDA libraries, TensorRT libraries.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec

from cloudrt.engines import tensorrt_rtx
from cloudrt.engines.libraries import cuda_libraries, cuda_major, is_present, tensorrt_libraries
from cloudrt.errors import ProviderError
from cloudrt.options import PROVIDERS
from cloudrt.system.nvidia import KERNEL_MODULE, nvidia_driver
from cloudrt.system.versions import install_command, package_versions

NAMES = PROVIDERS[1:]
"""The providers, usually fastest first."""

ORT_NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": tensorrt_rtx.EP_NAME,
}
"""ONNX Runtime's names of its providers."""


@dataclass(frozen=True)
class Obstacle:
    """Why a provider cannot run, and what to install or do."""

    reason: str
    remedy: str


def problem(provider: str) -> str | None:
    """Return why `provider` cannot run on this machine, with what to install or do, or None if it can.

    Raises
    ------
    ProviderError
        No provider of that name.
    """
    found = obstacle(provider)
    return None if found is None else f"{found.reason}: {found.remedy}"


def obstacle(provider: str) -> Obstacle | None:
    """Return the first reason why `provider` cannot run on this machine, or None; the errors are those of `problem`."""
    if provider not in NAMES:
        raise ProviderError(f"no provider named {provider!r}; known: {', '.join(NAMES)}")
    if provider == "openvino":
        missing = not _installed("openvino")
        return Obstacle("OpenVINO is not installed", install_command("openvino")) if missing else None
    if provider == "cpu":
        return _runtime_obstacle()
    extras = EXTRAS[provider]
    found = _driver_obstacle(extras)
    if provider == "tensorrt-rtx":
        return found or _capability_obstacle() or _runtime_obstacle() or _plugin_obstacle()
    return found or _runtime_obstacle() or _gpu_obstacle(provider, extras)


EXTRAS = {"cuda": "cuda", "tensorrt": "cuda,tensorrt", "tensorrt-rtx": "tensorrt-rtx"}
"""GPU provider -> extras of cloudrt that install its libraries."""


def _driver_obstacle(extras: str) -> Obstacle | None:
    driver = nvidia_driver()
    if driver is None and KERNEL_MODULE.exists():
        return Obstacle(
            "the NVIDIA driver of the host is not available in this container (no libcuda.so.1)",
            "install the NVIDIA Container Toolkit and start the container with --gpus all",
        )
    if driver is None:
        return Obstacle(
            "no NVIDIA GPU, or no driver",
            f"install NVIDIA's driver, then {install_command(extras)}; or use provider cpu",
        )
    if not driver.gpus:
        fault = f" ({driver.fault})" if driver.fault else ""
        if driver.fault not in ("", "CUDA_ERROR_NO_DEVICE"):
            return Obstacle(
                f"NVIDIA's driver cannot be used{fault}", "restart the machine, or install the driver again"
            )
        return Obstacle(
            f"NVIDIA's driver finds no GPU that this process may use{fault}",
            "check CUDA_VISIBLE_DEVICES, and start containers with --gpus all",
        )
    return None


def _runtime_obstacle() -> Obstacle | None:
    if find_spec("onnxruntime") is None:
        return Obstacle("ONNX Runtime is not installed", f"pip install {runtime_package()}")
    if not _installed("onnxruntime"):
        # Uninstalling one of its two builds also removes files of the other.
        return Obstacle(
            "some of ONNX Runtime's files are missing",
            f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install {runtime_package()}",
        )
    return None


def runtime_package() -> str:
    """Return the distribution of ONNX Runtime that cloudrt depends on, on this platform."""
    import platform

    has_gpu_build = (sys.platform, platform.machine()) in (("linux", "x86_64"), ("win32", "AMD64"))
    return "onnxruntime-gpu" if has_gpu_build else "onnxruntime"


def _gpu_obstacle(provider: str, extras: str) -> Obstacle | None:
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if ORT_NAMES[provider] not in available:
        if runtime_package() == "onnxruntime-gpu":
            remedy = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
        else:
            remedy = "PyPI has no GPU build for this platform; install one from elsewhere, or use provider cpu"
        if len(package_versions("onnxruntime", "onnxruntime-gpu")) == 2:
            return Obstacle("onnxruntime and onnxruntime-gpu overwrite each other's files", remedy)
        lacking = "TensorRT" if ORT_NAMES["cuda"] in available else "CUDA"
        return Obstacle(f"this ONNX Runtime was built without {lacking}", remedy)
    major = cuda_major()
    old = _age_obstacle("ONNX Runtime", major)
    if old:
        return old
    missing = [name for name in cuda_libraries(major) if not is_present(name)]
    if missing:
        return Obstacle(f"{', '.join(missing)} not found", install_command(extras))
    if provider == "tensorrt" and not _installed("tensorrt") and not all(map(is_present, tensorrt_libraries())):
        return Obstacle("TensorRT 10 is not installed", install_command(extras))
    return None


def _capability_obstacle() -> Obstacle | None:
    driver = nvidia_driver()
    capabilities = driver.capabilities if driver else ()
    if any(map(tensorrt_rtx.supports, capabilities)):
        return None
    found = ", ".join(
        f"{gpu} has {major}.{minor}"
        for gpu, (major, minor) in zip(driver.gpus if driver else (), capabilities, strict=False)
    )
    return Obstacle(
        f"TensorRT for RTX needs compute capability {tensorrt_rtx.SUPPORTED}: {found}",
        "use provider cuda or tensorrt",
    )


def _plugin_obstacle() -> Obstacle | None:
    if not _installed(tensorrt_rtx.MODULE):
        return Obstacle("TensorRT for RTX is not installed", tensorrt_rtx.INSTALL)
    if sys.platform == "linux" and not is_present("libnvidia-ml.so.1"):
        return Obstacle(
            "libnvidia-ml.so.1, a part of NVIDIA's driver, is not found",
            "start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        )
    return _age_obstacle("TensorRT for RTX", tensorrt_rtx.CUDA_MAJOR)


def _age_obstacle(who: str, major: int) -> Obstacle | None:
    driver = nvidia_driver()
    if driver is None or driver.cuda[0] >= major:
        return None
    return Obstacle(
        f"NVIDIA's driver supports CUDA {driver.cuda[0]}.{driver.cuda[1]} at most, {who} needs CUDA {major}",
        f"install a newer NVIDIA driver, one for CUDA {major}",
    )


def _installed(package: str) -> bool:
    """Return whether a package is installed with its `__init__`, not only a leftover folder; does not import it."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None
