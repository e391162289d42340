"""The options of ONNX Runtime's TensorRT provider, and where its engines are kept: the one place that knows them.

Values alone are computed here, so that they can be tested where there is no TensorRT; `engines/onnxruntime.py` and the
Triton repository of export take them from here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cloudrt.model.artifact import Artifact
from cloudrt.system.nvidia import nvidia_driver
from cloudrt.system.versions import package_version

LARGEST_FREE_BATCH = 32
"""The largest N that an engine takes where the batch size is left free."""


@dataclass(frozen=True)
class EngineKey:
    """All that a TensorRT engine depends on; another value of any of them asks for another engine.

    TensorRT's own key knows neither the weights nor the GPU's name: a second model of the same graph would run with
    the first one's weights.

    Parameters
    ----------
    model_sha256
        Of the artifact's bytes.
    onnxruntime, tensorrt
        Versions.
    gpu
        Its name and memory.
    precision
        Of the artifact.
    options
        Of the provider, those that name no folder: profiles among them.
    """

    model_sha256: str
    onnxruntime: str
    tensorrt: str
    gpu: str
    precision: str
    options: tuple[tuple[str, str], ...]

    def folder(self) -> str:
        """Return the name of the folder that holds this engine: 16 hexadecimal digits."""
        parts = [self.model_sha256, self.onnxruntime, self.tensorrt, self.gpu, self.precision]
        parts += [f"{name}={value}" for name, value in sorted(self.options)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def build_options(
    artifact: Artifact, batch_size: int | None, largest_batch: int = LARGEST_FREE_BATCH
) -> dict[str, str]:
    """Return the options that an engine is built with: what it may compute in, and the shapes that it takes.

    With a fixed batch the profile's minimum, optimum and maximum are one shape, for which TensorRT tunes best; a free
    one spans 1 to `largest_batch`. The int8 scales lie in the artifact; what is not int8 there may be fp16.
    """
    height, width = artifact.input_size
    smallest, largest = batch_size or 1, batch_size or largest_batch
    usual = batch_size or max(1, largest_batch // 4)
    lowered = artifact.precision != "fp32"
    options = {
        "trt_fp16_enable": str(int(lowered)),
        "trt_int8_enable": str(int(artifact.precision == "int8")),
        # Sums over whole maps in normalisation overflow fp16.
        "trt_layer_norm_fp32_fallback": str(int(lowered)),
    }
    for edge, batch in (("min", smallest), ("opt", usual), ("max", largest)):
        options[f"trt_profile_{edge}_shapes"] = f"image:{batch}x{height}x{width}x3"
    return options


def cache_options(folder: Path) -> dict[str, str]:
    """Return the options that keep engines and the timings of their kernels in `folder`."""
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_engine_cache_prefix": "cloudrt",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }


def engine_folder(artifact: Artifact, batch_size: int | None, content: bytes, cache: Path, device: int = 0) -> Path:
    """Return the folder, in `cache`, of the engine for an artifact of these bytes on this machine's GPU `device`."""
    driver = nvidia_driver()
    gpus = driver.gpus if driver else ()
    key = EngineKey(
        hashlib.sha256(content).hexdigest(),
        package_version("onnxruntime-gpu", "onnxruntime"),
        package_version("tensorrt-cu13", "tensorrt"),
        gpus[device] if device < len(gpus) else "",
        artifact.precision,
        tuple(build_options(artifact, batch_size).items()),
    )
    return cache / key.folder()


def triton_options(artifact: Artifact, largest_batch: int) -> dict[str, str]:
    """Return the options of `build_options` in the names of Triton's ONNX Runtime backend, for batches of 1 to
    `largest_batch`. The engines' folder is the server's business."""
    build = build_options(artifact, None, largest_batch)
    mode = {"fp32": "FP32", "int8": "INT8"}.get(artifact.precision, "FP16")
    switches = ("trt_fp16_enable", "trt_int8_enable")
    return {"precision_mode": mode} | {name: value for name, value in build.items() if name not in switches}
