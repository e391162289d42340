"""The options of ONNX Runtime's TensorRT provider, and where its engines are kept: the one place that knows them.

Values alone are computed here, so that they can be tested where there is no TensorRT; `engines/session.py` and the
Triton repository of export take them from here.

The switches of fp16, bf16 and int8 stay off: ONNX Runtime then builds a strongly typed network, in which every layer
computes in the type that the artifact gives it. With them, TensorRT may lower layers that the artifact keeps in fp32.
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


def profile_options(
    prefix: str, artifact: Artifact, batch_size: int | None, largest_batch: int = LARGEST_FREE_BATCH
) -> dict[str, str]:
    """Return the shapes of the optimisation profile, as options whose names begin with `prefix`.

    With a fixed batch the profile's minimum, optimum and maximum are one shape, for which TensorRT tunes best; a free
    one spans 1 to `largest_batch`.
    """
    height, width = artifact.input_size
    usual = batch_size or max(1, largest_batch // 4)
    edges = (("min", batch_size or 1), ("opt", usual), ("max", batch_size or largest_batch))
    return {f"{prefix}_profile_{edge}_shapes": f"image:{batch}x{height}x{width}x3" for edge, batch in edges}


def build_options(
    artifact: Artifact, batch_size: int | None, largest_batch: int = LARGEST_FREE_BATCH
) -> dict[str, str]:
    """Return the options that an engine is built with: the shapes that it takes."""
    return profile_options("trt", artifact, batch_size, largest_batch)


def cache_options(folder: Path) -> dict[str, str]:
    """Return the options that keep engines and the timings of their kernels in `folder`."""
    return {
        "trt_engine_cache_enable": "True",  # ONNX Runtime's Python binding accepts True and False alone
        "trt_engine_cache_path": str(folder),
        "trt_engine_cache_prefix": "cloudrt",
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(folder),
    }


def engine_key(
    artifact: Artifact, content: bytes, options: dict[str, str], device: int, packages: tuple[str, ...]
) -> EngineKey:
    """Return the key of the engine for an artifact of these bytes on this machine's GPU `device`.

    `packages` are the distributions of TensorRT, one of which is installed.
    """
    driver = nvidia_driver()
    gpus = driver.gpus if driver else ()
    return EngineKey(
        model_sha256=hashlib.sha256(content).hexdigest(),
        onnxruntime=package_version("onnxruntime-gpu", "onnxruntime"),
        tensorrt=package_version(*packages),
        gpu=gpus[device] if device < len(gpus) else "",
        precision=artifact.precision,
        options=tuple(options.items()),
    )


def engine_folder(artifact: Artifact, batch_size: int | None, content: bytes, cache: Path, device: int = 0) -> Path:
    """Return the folder, in `cache`, of the engine for an artifact of these bytes on this machine's GPU `device`."""
    options = build_options(artifact, batch_size)
    return cache / engine_key(artifact, content, options, device, ("tensorrt-cu13", "tensorrt")).folder()


def triton_options(artifact: Artifact, largest_batch: int) -> dict[str, str]:
    """Return the options of `build_options` in the names of Triton's ONNX Runtime backend, for batches of 1 to
    `largest_batch`. The engines' folder is the server's business.

    FP32 turns no switch on: the network is strongly typed and follows the artifact.
    """
    return {"precision_mode": "FP32"} | build_options(artifact, None, largest_batch)
