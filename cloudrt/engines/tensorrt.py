"""The options of ONNX Runtime's TensorRT provider, and the cache folder of its engines.

This module only computes values, so that tests do not need TensorRT. `engines/session.py`, `engines/tensorrt_rtx.py`
and the export to Triton use them.

The options that enable fp16, bf16 and int8 are not set: ONNX Runtime then builds a strongly typed network, in which
every layer computes in its type in the artifact. With these options, TensorRT could use a lower precision for layers
that the export left in fp32.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cloudrt.model.artifact import Artifact
from cloudrt.system.nvidia import nvidia_driver
from cloudrt.system.versions import package_version

LARGEST_FREE_BATCH = 32
"""The largest N of an engine without a fixed batch size."""


@dataclass(frozen=True)
class EngineKey:
    """Everything that a TensorRT engine depends on; if one value differs, another engine is built.

    The cache key of ONNX Runtime's TensorRT provider contains neither the weights nor the name of the GPU: a second
    model with the same graph would run with the weights of the first.

    Parameters
    ----------
    model_sha256
        SHA-256 of the artifact's graph, without metadata.
    onnxruntime, tensorrt
        Versions of the packages.
    gpu
        Name and memory of the GPU.
    precision
        Precision of the artifact.
    options
        Options of the provider, such as the shapes of the profile, without those that are paths.
    """

    model_sha256: str
    onnxruntime: str
    tensorrt: str
    gpu: str
    precision: str
    options: tuple[tuple[str, str], ...]

    def folder(self) -> str:
        """Return the name of the cache folder of this engine: 16 hexadecimal digits."""
        parts = [self.model_sha256, self.onnxruntime, self.tensorrt, self.gpu, self.precision]
        parts += [f"{name}={value}" for name, value in sorted(self.options)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def profile_options(
    prefix: str, artifact: Artifact, batch_size: int | None, largest_batch: int = LARGEST_FREE_BATCH
) -> dict[str, str]:
    """Return the shapes of the optimisation profile, as options whose names begin with `prefix`.

    With a fixed batch size, the minimum, optimum and maximum shape are equal, and TensorRT optimises for this shape. If
    `batch_size` is None, the profile covers batches of 1 to `largest_batch`.
    """
    height, width = artifact.input_size
    usual = batch_size or max(1, largest_batch // 4)
    edges = (("min", batch_size or 1), ("opt", usual), ("max", batch_size or largest_batch))
    return {f"{prefix}_profile_{edge}_shapes": f"image:{batch}x{height}x{width}x3" for edge, batch in edges}


def build_options(
    artifact: Artifact, batch_size: int | None, largest_batch: int = LARGEST_FREE_BATCH
) -> dict[str, str]:
    """Return the options that an engine is built with: the shapes of its profile."""
    return profile_options("trt", artifact, batch_size, largest_batch)


def cache_options(folder: Path) -> dict[str, str]:
    """Return the options that store engines, and the timings of their kernels, in `folder`."""
    return {
        "trt_engine_cache_enable": "True",  # ONNX Runtime's Python binding accepts only True and False
        "trt_engine_cache_path": str(folder),
        "trt_engine_cache_prefix": "cloudrt",
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(folder),
    }


def engine_key(
    artifact: Artifact, content: bytes, options: dict[str, str], device: int, packages: tuple[str, ...]
) -> EngineKey:
    """Return the key of the engine for an artifact on a GPU of this machine.

    Parameters
    ----------
    artifact, content
        The artifact's metadata, and its serialised graph; see `graph_bytes`.
    options
        Options of the provider that are not paths.
    device
        GPU number.
    packages
        Names of the distributions of TensorRT; the first installed one gives the version.
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
    """Return the folder, in `cache`, of the engine for an artifact, with the graph `content`, on GPU `device`."""
    options = build_options(artifact, batch_size)
    return (
        cache / engine_key(artifact, content, options, device, ("tensorrt-cu13", "tensorrt-cu12", "tensorrt")).folder()
    )


def triton_options(artifact: Artifact, largest_batch: int) -> dict[str, str]:
    """Return the options of `build_options` for Triton's ONNX Runtime backend, for batches of 1 to `largest_batch`.

    The server configures the folder of the engines. The precision mode FP32 enables no lower precision: the network is
    strongly typed and has the types of the artifact.
    """
    return {"precision_mode": "FP32"} | build_options(artifact, None, largest_batch)
