"""ONNX Runtime: its CPU, CUDA and TensorRT providers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as state

from cloudrt.artifact import Artifact
from cloudrt.engines import tensorrt
from cloudrt.engines.availability import load_libraries
from cloudrt.engines.base import check_batch
from cloudrt.engines.widen import widen
from cloudrt.errors import ArtifactError, ProviderError

NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
HEAVY = frozenset({"Conv", "Resize", "InstanceNormalization", "BatchNormalization", "LayerNormalization"})
"""Operators that must run where the user asked for; ONNX Runtime places them on the CPU without an error otherwise."""
REFUSALS = (state.EPFail, state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf,
            state.NotImplemented, state.RuntimeException)  # fmt: skip
"""What ONNX Runtime raises; they share no base below Exception."""


class OrtEngine:
    """An artifact in an ONNX Runtime session; see `cloudrt.engines.Engine`.

    Raises
    ------
    ArtifactError
        ONNX Runtime refuses the graph.
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
        *,
        emulate: bool = False,
    ) -> None:
        self.artifact = artifact
        self.provider = provider
        self.batch_size = batch_size
        if provider == "cpu" and artifact.precision == "fp16" and not emulate:
            model = widen(model)
        load_libraries(provider)
        content = model.SerializeToString()
        options = session_options(provider, batch_size, threads)
        if emulate:  # int8 layers in float between their roundings
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        providers = [(NAMES[provider], provider_options(provider, artifact, batch_size, content))]
        if provider == "tensorrt":
            providers.append((NAMES["cuda"], provider_options("cuda", artifact, batch_size, content)))
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=providers)
        except REFUSALS as error:
            raise ArtifactError(f"ONNX Runtime refuses the model: {str(error).splitlines()[0]}") from error
        if provider != "cpu":
            self._check_placement()
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, batch: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Return probability (N, C, W_out, H_out) and presence (N, C), or None, of (N, H, W, 3) uint8 RGB images."""
        check_batch(batch, self.artifact, self.batch_size)
        try:
            values = self._session.run(None, {"image": batch})
        except REFUSALS as error:
            raise ProviderError(
                f"{self.provider} failed on a batch of {len(batch)}: {str(error).splitlines()[0]}; "
                "if memory ran out, give a smaller --batch-size"
            ) from error
        found = dict(zip(self._outputs, values, strict=True))
        return found["probability"], found.get("presence")

    def probability(self, batch: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the probability alone."""
        return self.run(batch)[0]

    def close(self) -> None:
        """Release the session's memory."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_placement(self) -> None:
        """Fail where the session runs elsewhere than asked for."""
        wanted = NAMES[self.provider]
        if self._session.get_providers()[0] != wanted:
            raise ProviderError(
                f"--provider {self.provider} was asked for, and ONNX Runtime took {self._session.get_providers()[0]}: "
                "cloudrt doctor says what is missing"
            )
        strayed = set()
        for part in self._session.get_provider_graph_assignment_info():
            if part.ep_name == NAMES["cpu"]:
                strayed |= {node.op_type for node in part.get_nodes()} & HEAVY
        if strayed:
            raise ProviderError(
                f"--provider {self.provider} was asked for, and ONNX Runtime placed {', '.join(sorted(strayed))} on "
                "the CPU: use --provider cpu, or another precision"
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


def provider_options(provider: str, artifact: Artifact, batch_size: int | None, content: bytes) -> dict[str, str]:
    """Return the options of a provider.

    CUDA looks convolutions up instead of timing all of them for every shape; TensorRT's lie in `engines/tensorrt.py`.
    """
    if provider == "cuda":
        return {
            "cudnn_conv_algo_search": "HEURISTIC",
            "cudnn_conv_use_max_workspace": "1",
            "arena_extend_strategy": "kSameAsRequested",
            "do_copy_in_default_stream": "1",
        }
    if provider == "tensorrt":
        return tensorrt.provider_options(artifact, batch_size, content, _cache_folder())
    return {}


def _cache_folder() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("cloudrt") / "tensorrt"
