"""The values of TensorRT's options, and the key of its engine cache. TensorRT is neither needed nor run."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from cloudrt.engines import tensorrt
from cloudrt.engines.base import EngineOptions
from cloudrt.engines.session import provider_options, tensorrt_engine_exists
from cloudrt.engines.tensorrt import EngineKey, build_options, cache_options, engine_folder, triton_options
from cloudrt.model.artifact import Artifact
from cloudrt.system.nvidia import Driver

ARTIFACT = Artifact(input_size=(64, 96), precision="fp16")
KEY = EngineKey(
    "ab" * 32, "1.31.1", "10.9.0", "NVIDIA H200, 139 GiB", "fp16", (("trt_profile_min_shapes", "image:8x64x96x3"),)
)


def test_a_fixed_batch_has_one_shape() -> None:
    options = build_options(ARTIFACT, 8)
    assert {options[f"trt_profile_{edge}_shapes"] for edge in ("min", "opt", "max")} == {"image:8x64x96x3"}


def test_a_free_batch_has_a_range() -> None:
    options = build_options(ARTIFACT, None)
    shapes = [options[f"trt_profile_{edge}_shapes"] for edge in ("min", "opt", "max")]
    assert shapes == ["image:1x64x96x3", "image:8x64x96x3", "image:32x64x96x3"]


@pytest.mark.parametrize(
    "change",
    [
        {"model_sha256": "cd" * 32},
        {"onnxruntime": "1.32.0"},
        {"tensorrt": "10.10.0"},
        {"gpu": "NVIDIA A100, 80 GiB"},
        {"precision": "int8"},
        {"options": (("trt_profile_min_shapes", "image:4x64x96x3"),)},
    ],
)
def test_each_part_of_the_key_gives_another_engine(change: dict[str, object]) -> None:
    assert replace(KEY, **change).folder() != KEY.folder()  # type: ignore[arg-type]
    assert replace(KEY).folder() == KEY.folder()
    assert len(KEY.folder()) == 16


def test_the_key_is_made_of_the_bytes_and_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    versions = {"onnxruntime-gpu": "1.31.1", "tensorrt-cu13": "10.9.0"}
    monkeypatch.setattr(tensorrt, "package_version", lambda *names: versions[names[0]])
    monkeypatch.setattr(tensorrt, "nvidia_driver", lambda: Driver((13, 0), ("NVIDIA H200, 139 GiB",)))
    build = build_options(ARTIFACT, 8)
    key = EngineKey(
        hashlib.sha256(b"model").hexdigest(), "1.31.1", "10.9.0", "NVIDIA H200, 139 GiB", "fp16", tuple(build.items())
    )
    assert engine_folder(ARTIFACT, 8, b"model", tmp_path) == tmp_path / key.folder()
    folders = {
        engine_folder(artifact, batch, content, tmp_path, device)
        for artifact in (ARTIFACT, replace(ARTIFACT, precision="fp32"))
        for batch in (8, 16, None)
        for content in (b"model", b"another")
        for device in (0, 1)  # there is no second GPU here: its name is unknown
    }
    assert len(folders) == 24


def test_an_engine_is_found_where_onnxruntime_keeps_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = provider_options("tensorrt", ARTIFACT, 8, b"model", EngineOptions(cuda_graph=True, device=1))
    folder = engine_folder(ARTIFACT, 8, b"model", tmp_path / "cloudrt" / "tensorrt", 1)
    assert options == {
        "device_id": "1",
        "trt_cuda_graph_enable": "True",
        **build_options(ARTIFACT, 8),
        **cache_options(folder),
    }
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == str(folder)
    assert all(isinstance(value, str) for value in options.values())
    assert not tensorrt_engine_exists(ARTIFACT, 8, b"model", 1)
    (folder / "cloudrt_TensorrtExecutionProvider_TRTKernel_graph_0_sm90.engine").touch()
    assert tensorrt_engine_exists(ARTIFACT, 8, b"model", 1)
    assert not tensorrt_engine_exists(ARTIFACT, 8, b"another", 1)


def test_tritons_names() -> None:
    options = triton_options(ARTIFACT, 16)
    assert options["precision_mode"] == "FP32"  # no switch: the network follows the artifact's types
    assert options["trt_profile_opt_shapes"] == "image:4x64x96x3"
    assert options["trt_profile_max_shapes"] == "image:16x64x96x3"
    assert not [name for name in options if name.endswith(("fp16_enable", "int8_enable", "bf16_enable"))]
