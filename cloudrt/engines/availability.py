"""Why a provider cannot run on this machine, found without opening a session.

ONNX Runtime lists CUDA and TensorRT wherever its GPU build is installed, logs two loud lines when they cannot load, and
then runs on the CPU: so check before asking. Checks run cheapest first and stop at the first obstacle: driver, GPU,
ONNX Runtime's build, CUDA's libraries, TensorRT's.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from cloudrt.errors import ProviderError
from cloudrt.options import PROVIDERS
from cloudrt.system.nvidia import nvidia_driver

NAMES = PROVIDERS[1:]
"""The providers, those that tend to be the fastest first."""

ORT_NAMES = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


@dataclass(frozen=True)
class Obstacle:
    """Why a provider cannot run, and what to install or to do about it."""

    reason: str
    remedy: str


def problem(provider: str) -> str | None:
    """Return why `provider` cannot run here, ending with what to install, or None where nothing stands against it.

    Raises
    ------
    ProviderError
        No provider of that name.
    """
    found = obstacle(provider)
    return None if found is None else f"{found.reason}: {found.remedy}"


def obstacle(provider: str) -> Obstacle | None:
    """Return the first thing that stands against `provider`, or None; see `problem` for the errors."""
    if provider not in NAMES:
        raise ProviderError(f"no provider named {provider!r}: {', '.join(NAMES)}")
    if provider == "openvino":
        return (
            None if _installed("openvino") else Obstacle("OpenVINO is not installed", "pip install 'cloudrt[openvino]'")
        )
    if provider == "cpu":
        return _runtime_obstacle()
    extras = "cuda" if provider == "cuda" else "cuda,tensorrt"
    return _driver_obstacle(extras) or _runtime_obstacle() or _gpu_obstacle(provider, extras)


def load_libraries(provider: str) -> None:
    """Load the libraries of pip's CUDA and TensorRT packages, which ONNX Runtime does not find by itself.

    To be called before the first session of "cuda" or "tensorrt"; does nothing for the others.
    """
    if provider not in ORT_NAMES:
        return
    import onnxruntime

    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find; `problem` has told
        onnxruntime.preload_dlls()
    if provider == "tensorrt" and _installed("tensorrt"):
        import tensorrt  # noqa: F401 - importing it loads libnvinfer


def _driver_obstacle(extras: str) -> Obstacle | None:
    driver = nvidia_driver()
    if driver is None and Path("/proc/driver/nvidia/version").exists():
        return Obstacle(
            "the machine's NVIDIA driver does not reach into this container (no libcuda.so.1)",
            "install the NVIDIA Container Toolkit and start the container with --gpus all",
        )
    if driver is None:
        return Obstacle(
            "no NVIDIA GPU, or no driver",
            f"install NVIDIA's driver, then pip install 'cloudrt[{extras}]'; or use --provider cpu",
        )
    if not driver.gpus:
        return Obstacle(
            "NVIDIA's driver shows this process no GPU",
            "look at CUDA_VISIBLE_DEVICES, and start a container with --gpus all",
        )
    return None


def _runtime_obstacle() -> Obstacle | None:
    if find_spec("onnxruntime") is None:
        return Obstacle("ONNX Runtime is not installed", "pip install --force-reinstall cloudrt")
    if not _installed("onnxruntime"):
        # Uninstalling one of its two builds takes files of the other along.
        return Obstacle(
            "ONNX Runtime's files are missing in part",
            f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install {runtime_package()}",
        )
    return None


def runtime_package() -> str:
    """Return the build of ONNX Runtime for this platform: the one that cloudrt depends on."""
    import platform

    has_gpu_build = (sys.platform, platform.machine()) in (("linux", "x86_64"), ("win32", "AMD64"))
    return "onnxruntime-gpu" if has_gpu_build else "onnxruntime"


def _gpu_obstacle(provider: str, extras: str) -> Obstacle | None:
    import onnxruntime

    if ORT_NAMES[provider] not in onnxruntime.get_available_providers():
        return Obstacle(
            "this ONNX Runtime was built without CUDA",
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu",
        )
    major = int(str(getattr(onnxruntime, "cuda_version", "") or "13").split(".")[0])
    driver = nvidia_driver()
    if driver is not None and driver.cuda[0] < major:
        return Obstacle(
            f"NVIDIA's driver serves CUDA {driver.cuda[0]}.{driver.cuda[1]} at most, ONNX Runtime needs CUDA {major}",
            f"install a newer NVIDIA driver, one for CUDA {major}",
        )
    missing = [name for name in _cuda_libraries(major) if not _can_load(name)]
    if missing:
        return Obstacle(f"{', '.join(missing)} not found", f"pip install 'cloudrt[{extras}]'")
    if provider == "tensorrt" and not _installed("tensorrt") and not _can_load(_tensorrt_library()):
        return Obstacle("TensorRT 10 is not installed", f"pip install 'cloudrt[{extras}]'")
    return None


def _cuda_libraries(major: int) -> tuple[str, ...]:
    """File names of what ONNX Runtime's CUDA provider loads beside the driver."""
    if sys.platform == "win32":
        return f"cublasLt64_{major}.dll", f"cublas64_{major}.dll", f"cudart64_{major}.dll", "cudnn64_9.dll"
    return f"libcudart.so.{major}", f"libcublas.so.{major}", f"libcublasLt.so.{major}", "libcudnn.so.9"


def _tensorrt_library() -> str:
    return "nvinfer_10.dll" if sys.platform == "win32" else "libnvinfer.so.10"


def _can_load(library: str) -> bool:
    """Whether pip's NVIDIA packages hold a library, torch for Windows does, or the system finds it."""
    spec = find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    patterns = (f"*/lib/{library}", f"*/bin/{library}", f"*/bin/*/{library}")
    if any(next(root.glob(pattern), None) for root in roots for pattern in patterns):
        return True
    torch = find_spec("torch")
    if sys.platform == "win32" and torch and torch.origin and (Path(torch.origin).parent / "lib" / library).is_file():
        return True
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _installed(package: str) -> bool:
    """Whether a package is there with its `__init__`, and not just a folder that was left behind; imports nothing."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None
