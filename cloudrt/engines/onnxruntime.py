"""ONNX Runtime: its CPU, CUDA and TensorRT providers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, Self

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as state

from cloudrt.engines import tensorrt
from cloudrt.engines.availability import load_libraries
from cloudrt.engines.base import DEFAULTS, EngineOptions, check_batch, exhausted
from cloudrt.engines.binding import Binding
from cloudrt.engines.widen import widen
from cloudrt.errors import ArtifactError, CloudrtError, MemoryExhausted, ProviderError
from cloudrt.model.artifact import Artifact
from cloudrt.system.cache import cache_folder, open_entry

NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
HEAVY = frozenset({"Conv", "Resize", "InstanceNormalization", "BatchNormalization", "LayerNormalization"})
"""Operators that must run where the user asked for; ONNX Runtime places them on the CPU without an error otherwise."""
REFUSALS = (
    state.EPFail,
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NotImplemented,
    state.RuntimeException,
)
"""What ONNX Runtime raises; they share no base below Exception."""


class OrtEngine:
    """An artifact in an ONNX Runtime session; see `cloudrt.engines.Engine`.

    On a GPU with a fixed batch, every stream has buffers of its own there (IO binding): one copy in, one copy out, and
    nothing allocated from batch to batch.

    Raises
    ------
    ArtifactError
        ONNX Runtime refuses the graph.
    MemoryExhausted
        The device has no memory for it.
    ProviderError
        The provider did not load, or heavy nodes landed on the CPU although a GPU was asked for.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        artifact: Artifact,
        provider: str,
        batch_size: int | None,
        threads: int,
        options: EngineOptions = DEFAULTS,
    ) -> None:
        self.artifact = artifact
        self.provider = provider
        self.batch_size = batch_size
        self.streams = options.streams
        if provider == "cpu" and artifact.precision == "fp16" and not options.emulate:
            model = widen(model)
        load_libraries(provider)
        content = model.SerializeToString()
        settings = session_options(provider, batch_size, threads)
        if options.emulate:  # int8 layers in float between their roundings
            settings.add_session_config_entry("session.disable_quant_qdq", "1")
        providers = [(NAMES[provider], provider_options(provider, artifact, batch_size, content, options))]
        if provider == "tensorrt":
            spare = replace(options, cuda_graph=False)
            providers.append((NAMES["cuda"], provider_options("cuda", artifact, batch_size, content, spare)))
        # A CUDA graph belongs to the thread that recorded it.
        self._thread = ThreadPoolExecutor(1, "cuda-graph") if options.cuda_graph else None
        try:
            self._session = onnxruntime.InferenceSession(content, settings, providers=providers)
            if provider != "cpu":
                self._check_placement(options.allow_cpu)
            self._bindings = self._bind(options) if provider != "cpu" and batch_size else None
        except REFUSALS as error:
            self.close()
            raise self._explain(error, ArtifactError("ONNX Runtime refuses the model")) from error
        except BaseException:
            self.close()
            raise
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, batch: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Return probability (N, C, W_out, H_out) and presence (N, C), or None, of (N, H, W, 3) uint8 RGB images."""
        check_batch(batch, self.artifact, self.batch_size)
        try:
            found = self._thread.submit(self._run, batch).result() if self._thread else self._run(batch)
        except REFUSALS as error:
            raise self._explain(error, ProviderError(f"{self.provider} failed on a batch of {len(batch)}")) from error
        return found["probability"], found.get("presence")

    def _run(self, batch: NDArray[np.uint8]) -> dict[str, NDArray[np.uint8]]:
        if self._bindings is None:
            return dict(zip(self._outputs, self._session.run(None, {"image": batch}), strict=True))
        binding = self._bindings.get()
        try:
            return binding.run(batch)
        finally:
            self._bindings.put(binding)

    def _bind(self, options: EngineOptions) -> SimpleQueue[Binding]:
        """Return one binding a stream, each warmed up: the first batch chooses algorithms and fills the arena."""
        bindings: SimpleQueue[Binding] = SimpleQueue()
        for _ in range(options.streams):
            binding = Binding(self._session, self.artifact, self.batch_size or 1, "cuda", options.device)
            (self._thread.submit(binding.warm_up).result() if self._thread else binding.warm_up())
            bindings.put(binding)
        return bindings

    def _explain(self, error: Exception, otherwise: CloudrtError) -> CloudrtError:
        """Return the error to raise for one of ONNX Runtime's."""
        line = str(error).splitlines()[0]
        if exhausted(error):
            return MemoryExhausted(
                f"{self.provider} has no memory for a batch of {self.batch_size or 'any size'}: {line}"
            )
        return type(otherwise)(f"{otherwise}: {line}")

    def probability(self, batch: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the probability alone."""
        return self.run(batch)[0]

    def close(self) -> None:
        """Release the session's memory."""
        self._bindings = self._session = None
        if self._thread:
            self._thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_placement(self, allow_cpu: bool) -> None:
        """Fail where the session runs elsewhere than asked for; with `allow_cpu`, only where all of it does."""
        wanted = NAMES[self.provider]
        if self._session.get_providers()[0] != wanted:
            raise ProviderError(
                f"--provider {self.provider} was asked for, and ONNX Runtime took {self._session.get_providers()[0]}: "
                "cloudrt doctor says what is missing"
            )
        if allow_cpu:
            return
        strayed = set()
        for part in self._session.get_provider_graph_assignment_info():
            if part.ep_name == NAMES["cpu"]:
                strayed |= {node.op_type for node in part.get_nodes()} & HEAVY
        if strayed:
            raise ProviderError(
                f"--provider {self.provider} was asked for, and ONNX Runtime placed {', '.join(sorted(strayed))} on "
                "the CPU: use --provider cpu, or another precision, or accept it with --allow-cpu"
            )


def session_options(provider: str, batch_size: int | None, threads: int) -> Any:
    """Return the options of a session: threads as the container allows, errors alone in the log, N fixed."""
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

    CUDA looks convolutions up instead of timing all of them for every shape, and computes fp32 in fp32, not in TF32;
    TensorRT's lie in `engines/tensorrt.py`.
    """
    if provider == "cuda":
        return {
            "device_id": str(options.device),
            "cudnn_conv_algo_search": "HEURISTIC",
            "cudnn_conv_use_max_workspace": "1",
            "arena_extend_strategy": "kSameAsRequested",
            "do_copy_in_default_stream": "1",
            "use_tf32": str(int(artifact.precision != "fp32")),
            "enable_cuda_graph": str(int(options.cuda_graph)),
        }
    if provider == "tensorrt":
        folder = tensorrt.engine_folder(artifact, batch_size, content, cache_folder("tensorrt"), options.device)
        cached = open_entry("tensorrt", folder.name) is not None
        return {
            "device_id": str(options.device),
            "trt_cuda_graph_enable": str(int(options.cuda_graph)),
            **tensorrt.build_options(artifact, batch_size),
            **(tensorrt.cache_options(folder) if cached else {}),
        }
    return {}


def tensorrt_engine_exists(artifact: Artifact, batch_size: int | None, content: bytes, device: int = 0) -> bool:
    """Whether TensorRT has built its engine for these bytes and this batch on this machine."""
    folder = tensorrt.engine_folder(artifact, batch_size, content, cache_folder("tensorrt"), device)
    return next(folder.glob("*.engine"), None) is not None
