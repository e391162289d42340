"""Find and load NVIDIA's libraries in pip packages, for ONNX Runtime's CUDA and TensorRT providers.

ONNX Runtime does not search pip packages: the libraries must be loaded before it needs them. Availability checks and
loading search the same places: the `nvidia` folder of every entry of sys.path, torch's folder on Windows, then those
of the system's loader.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import sys
from importlib.util import find_spec
from pathlib import Path

from cloudrt.errors import ProviderError
from cloudrt.system.versions import install_command

WINDOWS = sys.platform == "win32"


def cuda_major() -> int:
    """Return the major CUDA version that ONNX Runtime was built for; 13 for a build without CUDA."""
    import onnxruntime

    return int(str(getattr(onnxruntime, "cuda_version", "") or "13").split(".")[0])


def cuda_libraries(major: int) -> tuple[str, ...]:
    """Return the file names of the libraries that the CUDA provider needs, in loading order."""
    if WINDOWS:
        return f"cublasLt64_{major}.dll", f"cublas64_{major}.dll", f"cudart64_{major}.dll", "cudnn64_9.dll"
    return (
        *(f"libcudart.so.{major}", f"libcublasLt.so.{major}", f"libcublas.so.{major}"),
        *("libcurand.so.10", "libcudnn.so.9"),
    )


def optional_libraries(major: int) -> tuple[str, ...]:
    """Return the file names of the libraries that cuDNN and rare operators load on first use."""
    fft = 12 if major >= 13 else 11
    return () if WINDOWS else (f"libnvrtc.so.{major}", f"libcufft.so.{fft}")


def tensorrt_libraries() -> tuple[str, ...]:
    """Return the file names of the libraries that the TensorRT provider needs in addition to `cuda_libraries`."""
    return ("nvinfer_10.dll", "nvonnxparser_10.dll") if WINDOWS else ("libnvinfer.so.10", "libnvonnxparser.so.10")


def find_library(name: str) -> Path | None:
    """Return the path of a library in NVIDIA's pip packages or, on Windows, in torch; None if it is in neither."""
    for entry in sys.path:
        for pattern in (f"*/lib/{name}", f"*/bin/{name}", f"*/bin/*/{name}"):
            found = next((Path(entry) / "nvidia").glob(pattern), None)
            if found:
                return found
    torch = find_spec("torch") if WINDOWS else None
    inside = Path(torch.origin).parent / "lib" / name if torch and torch.origin else None
    return inside if inside and inside.is_file() else None


def is_present(name: str) -> bool:
    """Return whether NVIDIA's pip packages contain a library, or the loader of the system can load it."""
    if find_library(name):
        return True
    with contextlib.suppress(OSError):
        ctypes.CDLL(name)
        return True
    return False


def load_libraries(provider: str) -> None:
    """Load the libraries of CUDA or TensorRT; call this before the first session. Does nothing for other providers.

    Raises
    ------
    ProviderError
        A library is missing or cannot be loaded, with the loader's message.
    """
    if provider not in ("cuda", "tensorrt"):
        return
    if WINDOWS:  # also loads the parts of cuDNN
        import onnxruntime

        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()
    major = cuda_major()
    for name in cuda_libraries(major):
        _load(name)
    for name in optional_libraries(major):
        with contextlib.suppress(ProviderError):
            _load(name)
    if provider == "tensorrt":
        if find_spec("tensorrt"):
            try:
                import tensorrt  # noqa: F401 - importing it loads its libraries
            except (ImportError, OSError) as error:
                raise ProviderError(
                    f"tensorrt cannot be imported: {error}: {install_command('cuda,tensorrt')}"
                ) from error
        for name in tensorrt_libraries():
            _load(name, "cuda,tensorrt")


def _load(name: str, extras: str = "cuda") -> None:
    path = find_library(name)
    try:
        ctypes.CDLL(str(path or name))
    except OSError as error:
        raise ProviderError(f"{name} cannot be loaded: {error}: {install_command(extras)}") from error
