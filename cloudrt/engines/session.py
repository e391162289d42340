"""Sessions of ONNX Runtime for artifacts: the options of each provider, and `open_session`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnxruntime

from cloudrt.engines import tensorrt, tensorrt_rtx
from cloudrt.engines.availability import ORT_NAMES
from cloudrt.engines.base import DEFAULTS, EngineOptions
from cloudrt.engines.libraries import load_libraries
from cloudrt.model.artifact import Artifact
from cloudrt.options import GPU_PROVIDERS
from cloudrt.system.cache import cache_folder, open_entry

FATAL = 4
"""ONNX Runtime's log level for fatal errors only."""


def open_session(
    content: bytes,
    artifact: Artifact,
    provider: str,
    batch_size: int | None,
    threads: int,
    options: EngineOptions = DEFAULTS,
) -> Any:
    """Return an `onnxruntime.InferenceSession` of a model with a provider.

    ONNX Runtime's fallback, which would retry on the CPU after an error, is switched off.

    Parameters
    ----------
    content
        The serialised model.
    artifact
        Its metadata.
    provider
        One of `ORT_NAMES`.
    batch_size
        The fixed N, or None for any N.
    threads
        Number of CPU threads of the session.
    options
        See `EngineOptions`.

    Raises
    ------
    ProviderError
        A library of the provider cannot be loaded, or TensorRT for RTX does not support the GPU.
    Exception
        An exception of ONNX Runtime; see `REFUSALS` in `cloudrt.engines.onnxruntime`.
    """
    load_libraries(provider)
    if provider in GPU_PROVIDERS:
        # ONNX Runtime logs two errors for each convolution that cuDNN cannot fuse; errors that matter are also raised.
        # This setting applies to the whole process.
        onnxruntime.set_default_logger_severity(FATAL)
    settings = session_options(provider, batch_size, threads)
    if options.emulate:  # compute int8 layers in float between quantisation and dequantisation
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
    chosen = provider_options(provider, artifact, batch_size, content, options)
    if provider == "tensorrt-rtx":
        settings.add_provider_for_devices([tensorrt_rtx.find_device(options.device)], chosen)
        return onnxruntime.InferenceSession(content, settings, enable_fallback=0)
    providers = [(ORT_NAMES[provider], chosen)]
    if provider == "tensorrt":  # CUDA runs the nodes that TensorRT does not support
        without_graph = replace(options, cuda_graph=False)
        providers.append((ORT_NAMES["cuda"], provider_options("cuda", artifact, batch_size, content, without_graph)))
    return onnxruntime.InferenceSession(content, settings, providers=providers, enable_fallback=0)


def session_options(provider: str, batch_size: int | None, threads: int) -> Any:
    """Return the session options: number of threads, only errors logged, and N fixed unless `batch_size` is None."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if provider == "cpu":
        # Decoding and post-processing need the cores while the engine waits for its next batch.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    else:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if batch_size is not None:
        options.add_free_dimension_override_by_name("N", batch_size)
    return options


def provider_options(
    provider: str, artifact: Artifact, batch_size: int | None, content: bytes, options: EngineOptions = DEFAULTS
) -> dict[str, str]:
    """Return the options of a provider.

    CUDA uses the convolution algorithms that cuDNN's heuristic ranks first, instead of timing all algorithms for each
    shape. TF32 is off: layers that the export left in fp32 need the full precision. For TensorRT and TensorRT for RTX,
    see `cloudrt.engines.tensorrt` and `cloudrt.engines.tensorrt_rtx`.
    """
    if provider == "cuda":
        layout = str(int(options.channels_last))
        return {
            "device_id": str(options.device),
            "cudnn_conv_algo_search": "HEURISTIC",
            "cudnn_conv_use_max_workspace": "1",
            "arena_extend_strategy": "kSameAsRequested",
            "do_copy_in_default_stream": "1",
            "use_tf32": "0",
            "prefer_nhwc": layout,
            # Without NHWC, this would add a synchronous memset to each convolution, which also breaks a graph capture.
            "fuse_conv_bias": layout,
            "enable_cuda_graph": str(int(options.cuda_graph)),
        }
    if provider == "tensorrt":
        folder = tensorrt.engine_folder(artifact, batch_size, content, cache_folder("tensorrt"), options.device)
        cached = open_entry("tensorrt", folder.name) is not None
        return {
            "device_id": str(options.device),
            "trt_cuda_graph_enable": str(options.cuda_graph),
            **tensorrt.build_options(artifact, batch_size),
            **(tensorrt.cache_options(folder) if cached else {}),
        }
    if provider == "tensorrt-rtx":
        return tensorrt_rtx.plugin_options(artifact, batch_size, content, options.device, options.cuda_graph)
    return {}


def tensorrt_engine_exists(artifact: Artifact, batch_size: int | None, content: bytes, device: int = 0) -> bool:
    """Return whether the cache contains TensorRT's engine for this model, batch size and GPU."""
    folder = tensorrt.engine_folder(artifact, batch_size, content, cache_folder("tensorrt"), device)
    return next(folder.glob("*.engine"), None) is not None
