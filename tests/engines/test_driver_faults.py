"""GPUs that the driver or a provider refuses, with a stand-in for the driver; see `support.gpu_stub`."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.gpu_stub import CAPI, build_stubs, python_with_stubs
from support.tiny import SMALL_GRIDS, tiny_artifact, write_jpegs

from cloudrt.engines.libraries import cuda_libraries, cuda_major, is_present


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("model") / "model.onnx", labels=SMALL_GRIDS)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jpegs(tmp_path_factory.mktemp("images"), 20)


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = CAPI / "libonnxruntime_providers_cuda.so"
    if not library.is_file():
        pytest.skip("this ONNX Runtime was built without CUDA")
    return build_stubs(tmp_path_factory.mktemp("stubs"), library)


def _infer(images: Path, model: Path, output: Path, provider: str) -> str:
    words = ["cloudrt-infer", str(images), "-m", str(model), "-o", str(output), "--provider", provider]
    return f"import sys; sys.argv = {words!r}; from cloudrt.cli import infer; infer()"


DRIVERS: list[tuple[dict[str, str], str, str]] = [
    ({}, "cuda", "no GPU that this process may use (CUDA_ERROR_NO_DEVICE): check CUDA_VISIBLE_DEVICES"),
    ({"STUB_FAULT": "803"}, "cuda", "cannot be used (CUDA_ERROR_SYSTEM_DRIVER_MISMATCH): restart the machine"),
    ({"STUB_GPUS": "9.0", "STUB_CUDA": "12080"}, "cuda", "supports CUDA 12.8 at most, ONNX Runtime needs CUDA 13"),
    ({"STUB_GPUS": "9.0"}, "tensorrt-rtx", "NVIDIA Stub, 8 GiB has 9.0: use provider cuda or tensorrt"),
    ({"STUB_GPUS": "8.0 7.5"}, "tensorrt-rtx", "needs compute capability 8.6, 8.9, or 12.0 and later"),
    ({"STUB_GPUS": "8.9", "STUB_CUDA": "12080"}, "tensorrt-rtx", "TensorRT for RTX needs CUDA 13"),
    ({"STUB_GPUS": "9.0 8.9"}, "tensorrt-rtx", "None"),  # one of them is supported
]


def test_errors_of_the_driver_are_one_line(stubs: Path) -> None:
    pytest.importorskip("onnxruntime_ep_nv_tensorrt_rtx")
    code = f"""
import os
from cloudrt.engines.availability import problem
for variables, provider, _ in {DRIVERS!r}:
    for name in ("STUB_FAULT", "STUB_GPUS", "STUB_CUDA"):
        os.environ.pop(name, None)
    os.environ.update(variables)
    print(problem(provider))
"""
    done = python_with_stubs(stubs, code)
    assert not done.stderr
    for line, (_, _, words) in zip(done.stdout.splitlines(), DRIVERS, strict=True):
        assert words in line


def test_a_gpu_that_the_plugin_does_not_support_is_refused(
    stubs: Path, model: Path, images: Path, tmp_path: Path
) -> None:
    done = python_with_stubs(stubs, _infer(images, model, tmp_path / "s.csv", "tensorrt-rtx"), STUB_GPUS="9.0")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "provider tensorrt-rtx cannot run here: TensorRT for RTX needs compute capability 8.6" in line
    assert not list(tmp_path.iterdir())


def test_a_driver_that_fails_when_cuda_opens_is_one_line(
    stubs: Path, model: Path, images: Path, tmp_path: Path
) -> None:
    """ONNX Runtime's CUDA provider itself, with a GPU that the driver lists and cannot use."""
    if not all(map(is_present, set(cuda_libraries(cuda_major())) - {"libcurand.so.10"})):
        pytest.skip("needs the CUDA libraries that torch brings")
    code = _infer(images, model, tmp_path / "s.csv", "cuda")
    done = python_with_stubs(stubs, code, STUB_GPUS="8.9", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("CUDA failure") == 1
    last = done.stderr.splitlines()[-1]
    assert "cuda cannot open the model: CUDA failure" in last and last.endswith("the driver and the libraries")
    assert not (tmp_path / "s.csv").exists()


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"STUB_FAULT": "803"}, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"),
        ({"STUB_GPUS": "8.9", "STUB_CUDA": "12080"}, "supports CUDA 12.8 at most"),
        ({"STUB_GPUS": "8.9"}, "CUDA failure"),
    ],
    ids=["fault", "too old", "cannot open"],
)
def test_auto_says_in_every_run_that_no_gpu_is_used(
    stubs: Path, model: Path, images: Path, tmp_path: Path, variables: dict[str, str], reason: str
) -> None:
    """And nothing about the GPU is stored that a repair of the driver would change."""
    if not all(map(is_present, set(cuda_libraries(cuda_major())) - {"libcurand.so.10"})):
        pytest.skip("needs the CUDA libraries that torch brings")
    cache = tmp_path / "cache"
    for name in ("first.csv", "second.csv"):
        code = _infer(images, model, tmp_path / name, "auto")
        done = python_with_stubs(stubs, code, XDG_CACHE_HOME=str(cache), **variables)
        assert done.returncode == 0, done.stderr
        (line,) = (line for line in done.stderr.splitlines() if "No GPU is used: " in line)
        assert reason in line
        assert (tmp_path / name).exists()
    assert all("CUDA failure" not in path.read_text() for path in (cache / "cloudrt" / "plans").iterdir())
