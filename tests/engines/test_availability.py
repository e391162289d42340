"""Why a provider cannot run on a machine: its driver, GPU, libraries and packages, each with a remedy."""

from __future__ import annotations

import ctypes
from importlib.machinery import ModuleSpec
from pathlib import Path

import onnxruntime
import pytest

from cloudrt.engines import availability
from cloudrt.engines.availability import problem
from cloudrt.engines.libraries import cuda_libraries
from cloudrt.errors import ProviderError
from cloudrt.system.nvidia import Driver, nvidia_driver

GPU = Driver((13, 0), ("NVIDIA H200, 140 GiB",))


def test_unknown_provider() -> None:
    with pytest.raises(ProviderError, match="no provider named 'rocm'; known: tensorrt, tensorrt-rtx, cuda, openvino"):
        problem("rocm")


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "nvidia_driver", lambda: None)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert str(problem("cuda")).startswith("no NVIDIA GPU, or no driver: ")
    assert "pip install '.[cuda,tensorrt]'" in str(problem("tensorrt"))
    monkeypatch.setattr(Path, "exists", lambda path: True)
    assert str(problem("cuda")).endswith("--gpus all")


def test_driver_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "nvidia_driver", lambda: Driver((13, 0), ()))
    assert "CUDA_VISIBLE_DEVICES" in str(problem("cuda"))


def test_gpu_without_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "nvidia_driver", lambda: GPU)
    listed = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0", raising=False)
    monkeypatch.setattr(availability, "is_present", lambda library: "cudnn" not in library)
    assert "cudnn" in str(problem("cuda")) and str(problem("cuda")).endswith(
        "pip install '.[cuda]' in the checkout of cloudrt"
    )
    monkeypatch.setattr(availability, "is_present", lambda library: "nvinfer" not in library)
    monkeypatch.setattr(availability, "_installed", lambda package: package != "tensorrt")
    assert problem("cuda") is None
    assert problem("tensorrt") == (
        "TensorRT 10 is not installed: pip install '.[cuda,tensorrt]' in the checkout of cloudrt"
    )
    monkeypatch.setattr(availability, "nvidia_driver", lambda: Driver((12, 8), GPU.gpus))
    assert "supports CUDA 12.8 at most" in str(problem("cuda"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(availability, "runtime_package", lambda: "onnxruntime-gpu")
    assert str(problem("cuda")).startswith("this ONNX Runtime was built without CUDA: pip uninstall")
    assert str(problem("cuda")).endswith("pip install onnxruntime-gpu")
    monkeypatch.setattr(availability, "runtime_package", lambda: "onnxruntime")
    assert "PyPI has no GPU build for this platform" in str(problem("cuda"))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed[1:])
    assert str(problem("tensorrt")).startswith("this ONNX Runtime was built without TensorRT: ")


@pytest.mark.parametrize("missing", cuda_libraries(13))
def test_every_missing_library_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "nvidia_driver", lambda: GPU)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0", raising=False)
    monkeypatch.setattr(availability, "is_present", lambda library: library != missing)
    assert problem("cuda") == f"{missing} not found: pip install '.[cuda]' in the checkout of cloudrt"


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "find_spec", lambda name: None)
    assert problem("openvino") == "OpenVINO is not installed: pip install '.[openvino]' in the checkout of cloudrt"
    assert str(problem("cpu")).startswith("ONNX Runtime is not installed: pip install")
    # A folder that an uninstalled package left behind is a namespace package, without a file of its own.
    monkeypatch.setattr(availability, "find_spec", lambda name: ModuleSpec(name, None))
    assert str(problem("cpu")).startswith("some of ONNX Runtime's files are missing: pip uninstall")


def test_two_builds_of_onnxruntime_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "cloudrt.engines.availability.nvidia_driver", lambda: Driver((13, 0), ("NVIDIA H200, 140 GiB",), ((9, 0),))
    )
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    both = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr("cloudrt.engines.availability.package_versions", lambda *names: both)
    assert problem("cuda") == (
        "onnxruntime and onnxruntime-gpu overwrite each other's files: pip uninstall -y onnxruntime onnxruntime-gpu && "
        "pip install onnxruntime-gpu"
    )


def test_driver_is_queried(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        """NVIDIA's driver as ctypes calls it; pointers are byref objects."""

        def cuDriverGetVersion(self, version: object) -> int:
            version._obj.value = 13010  # type: ignore[attr-defined]
            return 0

        def cuInit(self, flags: int) -> int:
            return 0

        def cuDeviceGetCount(self, count: object) -> int:
            count._obj.value = 1  # type: ignore[attr-defined]
            return 0

        def cuDeviceGetName(self, name: ctypes.Array[ctypes.c_char], length: int, index: int) -> int:
            name.value = b"NVIDIA T4"
            return 0

        def cuDeviceTotalMem_v2(self, size: object, index: int) -> int:
            size._obj.value = 16 * 2**30  # type: ignore[attr-defined]
            return 0

        def cuDeviceGetAttribute(self, number: object, attribute: int, index: int) -> int:
            number._obj.value = {75: 7, 76: 5}[attribute]  # type: ignore[attr-defined]
            return 0

        def cuGetErrorName(self, status: int, text: object) -> int:
            text._obj.value = b"CUDA_ERROR_NO_DEVICE"  # type: ignore[attr-defined]
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    assert nvidia_driver() == Driver((13, 1), ("NVIDIA T4, 16 GiB",), ((7, 5),))
    monkeypatch.setattr(Library, "cuInit", lambda self, flags: 100)
    assert nvidia_driver() == Driver((13, 1), (), fault="CUDA_ERROR_NO_DEVICE")
