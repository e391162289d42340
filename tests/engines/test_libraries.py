"""NVIDIA's libraries: which are needed, that checks and loading look in the same places, and what pip installs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support.gpu_stub import CAPI
from support.paths import setup_config

from cloudrt.engines import libraries
from cloudrt.engines.libraries import (
    cuda_libraries,
    cuda_major,
    find_library,
    is_present,
    load_libraries,
    tensorrt_libraries,
)
from cloudrt.errors import ProviderError

LINUX = sys.platform == "linux"


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_every_library_that_onnxruntime_is_linked_with_is_listed(provider: str) -> None:
    library = CAPI / f"libonnxruntime_providers_{provider}.so"
    if not LINUX or not library.is_file() or not shutil.which("readelf"):
        pytest.skip("needs readelf and ONNX Runtime's GPU build")
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    linked = set(re.findall(r"\(NEEDED\).*\[(lib(?:cu|nv)[^\]]*)\]", dynamic)) - {"libcuda.so.1"}
    assert linked
    assert linked <= {*cuda_libraries(cuda_major()), *(tensorrt_libraries() if provider == "tensorrt" else ())}


@pytest.mark.skipif(not LINUX, reason="uses library names of Linux")
def test_libraries_are_found_in_every_folder_of_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip install --user and --target may put libraries into a second `nvidia` package, elsewhere on `sys.path`."""
    for number, name in enumerate(("libfirst.so.1", "libsecond.so.1")):
        folder = tmp_path / str(number) / "nvidia" / "cu13" / "lib"
        folder.mkdir(parents=True)
        (folder.parent.parent / "__init__.py").touch()
        (folder / name).touch()
        monkeypatch.syspath_prepend(tmp_path / str(number))
        assert find_library(name) == folder / name
        assert is_present(name)
    assert find_library("libfirst.so.1")
    assert not is_present("libcudnn.so.no-such-version")


@pytest.mark.skipif(not LINUX, reason="uses library names of Linux")
def test_the_loaders_message_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that exists and cannot be loaded; ONNX Runtime would log an error and use the CPU."""
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    (folder / "libdamaged.so.13").write_bytes(b"half of a download")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(libraries, "cuda_libraries", lambda major: ("libdamaged.so.13",))
    assert is_present("libdamaged.so.13")
    with pytest.raises(ProviderError, match=r"libdamaged\.so\.13 cannot be loaded: .*(too short|invalid ELF header)"):
        load_libraries("cuda")


def test_cpu_providers_load_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_load", lambda name: pytest.fail(f"loads {name}"))
    load_libraries("cpu")
    load_libraries("openvino")


@pytest.fixture(scope="module")
def requirements() -> dict[str, list[Requirement]]:
    """Extra -> its requirements; "" for those that are always installed."""
    setup = setup_config()
    texts = {"": setup["options"]["install_requires"]} | dict(setup["options.extras_require"])
    return {extra: [Requirement(line) for line in text.split("\n") if line] for extra, text in texts.items()}


def test_versions_of_onnxruntime_that_cannot_work_are_excluded(requirements: dict[str, list[Requirement]]) -> None:
    """1.23 cannot say where nodes were placed; 1.27.0 cannot be imported without CUDA; 1.28.0 was tested."""
    asked = [one for several in requirements.values() for one in several if one.name.startswith("onnxruntime")]
    runtimes = [one for one in asked if one.name in ("onnxruntime", "onnxruntime-gpu")]
    assert len(runtimes) == 4
    for one in runtimes:
        assert not any(version in one.specifier for version in ("1.23.2", "1.24.0", "1.27.0")), one
        assert "1.28.0" in one.specifier and "1.31.1" in one.specifier


def test_the_extras_name_what_their_code_loads(requirements: dict[str, list[Requirement]]) -> None:
    names = {extra: {one.name for one in several} for extra, several in requirements.items()}
    assert {"nvidia-nvimgcodec-cu13", "nvidia-nvjpeg"} <= names["gpu-decode"]
    assert names["tensorrt-rtx"] == {"onnxruntime-ep-nv-tensorrt-rtx-cu13"}
    assert {"tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs"} <= names["dev"]
