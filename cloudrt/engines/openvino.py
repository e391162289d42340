"""The engine for OpenVINO's runtime on CPUs."""

from __future__ import annotations

from functools import cache
from io import BytesIO
from queue import SimpleQueue
from typing import Any

import numpy as np
import onnx
import openvino
from numpy.typing import NDArray

from cloudrt.engines.base import DEFAULTS, Engine, EngineOptions, check_batch, exhausted
from cloudrt.engines.compiled import open_folder, seal_folder
from cloudrt.engines.widen import widen
from cloudrt.errors import ArtifactError, CloudrtError, MemoryExhausted, ProviderError
from cloudrt.model.artifact import Artifact
from cloudrt.model.onnx_file import fix_batch

_CAPABILITIES = {"bf16": "BF16", "fp16": "FP16"}
_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


@cache
def native_precisions() -> tuple[str, ...]:
    """Return the precisions that this CPU has instructions for: "fp32", and perhaps "bf16" and "fp16"."""
    found = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("fp32", *(name for name, capability in _CAPABILITIES.items() if capability in found))


def require_precision(precision: str) -> None:
    """Raise ProviderError for a precision that this CPU has no instructions for."""
    native = native_precisions()
    if precision not in native:
        raise ProviderError(f"this CPU has no instructions for {precision}, only for {', '.join(native)}")


class OpenvinoEngine(Engine):
    """An artifact compiled by OpenVINO for the CPU; see `cloudrt.engines.base.Engine`.

    It has one infer request per stream. `run` uses a free request; OpenVINO computes all requests at once and
    divides its threads among them.

    Raises
    ------
    ArtifactError
        OpenVINO refuses the graph.
    MemoryExhausted
        There is not enough memory.
    ProviderError
        The CPU has no instructions for the precision; OpenVINO would use another one without an error.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        artifact: Artifact,
        batch_size: int | None,
        threads: int,
        options: EngineOptions = DEFAULTS,
    ) -> None:
        self.artifact = artifact
        self.provider = "openvino"
        self.batch_size = batch_size
        self.streams = options.streams
        require_precision(options.compute_precision)
        if artifact.precision == "fp16" and options.compute_precision != "fp16":
            model = widen(model)  # an fp16 graph would add conversions
        core = openvino.Core()
        try:
            content = (fix_batch(model, batch_size) if batch_size else model).SerializeToString()
            graph = core.read_model(BytesIO(content))
            folder = open_folder(content) if options.keep_compiled else None
            stored = {"CACHE_DIR": str(folder)} if folder else {}
            self._compiled = core.compile_model(graph, "CPU", compile_options(threads, options) | stored)
            if folder:
                seal_folder(folder)
            self._requests: SimpleQueue[Any] = SimpleQueue()
            for _ in range(options.streams):
                self._requests.put(self._compiled.create_infer_request())
        except (RuntimeError, MemoryError) as error:
            raise _explain(error, ArtifactError("OpenVINO refuses the model")) from error
        self._outputs = [output.get_any_name() for output in self._compiled.outputs]
        # OpenVINO fills a table of types at the first look-up; two threads that do so at once would deadlock.
        openvino.Type.u8.to_dtype()

    def run(self, batch: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Return probability (N, C, W_out, H_out) and presence (N, C) or None; see `Engine.run`."""
        check_batch(batch, self.artifact, self.batch_size)
        request = self._requests.get()
        try:
            values = request.infer({"image": batch}, share_inputs=True)
            # Copy: the next call of this request overwrites its output buffers.
            found = {name: np.array(values[i]) for i, name in enumerate(self._outputs)}
        except (RuntimeError, MemoryError) as error:
            raise _explain(error, ProviderError(f"OpenVINO failed on a batch of {len(batch)}")) from error
        finally:
            self._requests.put(request)
        return found["probability"], found.get("presence")

    def close(self) -> None:
        """Release the compiled model's memory."""
        self._requests, self._compiled = SimpleQueue(), None


def compile_options(threads: int, options: EngineOptions) -> dict[str, Any]:
    """Return the properties to compile with. Threads are not pinned to cores, because decoding threads use them too."""
    return {
        "INFERENCE_PRECISION_HINT": _HINTS[options.compute_precision],
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": str(options.streams),
        "ENABLE_CPU_PINNING": False,
        "EXECUTION_MODE_HINT": "PERFORMANCE",
    }


def _explain(error: Exception, otherwise: CloudrtError) -> CloudrtError:
    lines = [line for line in str(error).splitlines() if line.strip()]
    line = lines[-1] if lines else type(error).__name__
    if exhausted(error):
        return MemoryExhausted(f"OpenVINO ran out of memory: {line}")
    return type(otherwise)(f"{otherwise}: {line}")
