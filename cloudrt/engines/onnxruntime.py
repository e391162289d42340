"""The engine for ONNX Runtime's providers: CPU, CUDA, TensorRT and TensorRT for RTX."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as state

from cloudrt.engines.availability import ORT_NAMES
from cloudrt.engines.base import DEFAULTS, DIAGNOSIS, Engine, EngineOptions, brief, check_batch, exhausted
from cloudrt.engines.binding import Binding, open_gpu
from cloudrt.engines.session import open_session
from cloudrt.engines.widen import widen
from cloudrt.errors import ArtifactError, CloudrtError, MemoryExhausted, ProviderError
from cloudrt.model.artifact import Artifact
from cloudrt.model.onnx_file import graph_bytes
from cloudrt.options import GPU_PROVIDERS
from cloudrt.system.cuda import CAPTURE, Arena, Batch

logger = logging.getLogger(__name__)

HEAVY = frozenset({"Conv", "Resize", "InstanceNormalization", "BatchNormalization", "LayerNormalization"})
"""Operators that must run on the requested device; ONNX Runtime would move them to the CPU without an error."""
REFUSALS: tuple[type[Exception], ...] = (
    RuntimeError,  # IO binding and the constructors of providers raise it for all errors
    ValueError,  # an option of a provider that is not a number
    MemoryError,
    *(one for one in vars(state).values() if isinstance(one, type) and issubclass(one, Exception)),
)
"""The exceptions of ONNX Runtime, which have no common base class below Exception."""


class OrtEngine(Engine):
    """An artifact in an ONNX Runtime session; see `cloudrt.engines.base.Engine`.

    With CUDA or TensorRT, a fixed batch size and `pinned`, each batch in flight has its own buffers on the GPU (IO
    binding): it is copied there and back without an allocation. One more batch is in flight than is computed at once,
    so that copies overlap with computation.

    Raises
    ------
    ArtifactError
        ONNX Runtime's CPU provider refuses the graph.
    MemoryExhausted
        The device does not have enough memory.
    ProviderError
        A GPU provider did not load, cannot open the model, or gives different results with different buffers; or,
        without `allow_cpu`, ONNX Runtime placed operators of `HEAVY` on the CPU.
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
        self._arena: Arena | None = None
        self.place: tuple[str, int] | None = None  # the device whose arrays `run` accepts
        if provider == "cpu" and artifact.precision == "fp16" and not options.emulate:
            model = widen(model)
        # Batches are computed in the order in which they were copied, `streams` at once; a CUDA graph must be launched
        # by the thread that captured it.
        self._threads = ThreadPoolExecutor(1 if options.cuda_graph else options.streams, "compute")
        try:
            self._session = open_session(graph_bytes(model), artifact, provider, batch_size, threads, options)
            if provider != "cpu":
                self._check_placement(options.allow_cpu)
            bound = provider in ("cuda", "tensorrt") and batch_size and options.pinned
            self._bindings = self._bind(options) if bound else None
        except REFUSALS as error:
            self.close()
            on_gpu = provider in GPU_PROVIDERS
            refused: CloudrtError = (
                ProviderError(f"{provider} cannot open the model")
                if on_gpu
                else ArtifactError("ONNX Runtime refuses the model")
            )
            cause = error.with_traceback(None)  # the traceback refers to buffers and the session; see `run`
            raise self._explain(cause, refused) from cause
        except BaseException:
            self.close()
            raise
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, batch: Batch) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Return probability (N, C, W_out, H_out) and presence (N, C) or None; see `Engine.run`.

        The images may be in the memory of the device `place`.
        """
        check_batch(batch, self.artifact, self.batch_size)
        try:
            found = self._run(batch)
        except REFUSALS as error:
            # The traceback refers to buffers and the session; a smaller batch may need their memory.
            cause = error.with_traceback(None)
            raise self._explain(cause, ProviderError(f"{self.provider} failed on a batch of {len(batch)}")) from cause
        return found["probability"], found.get("presence")

    def empty(self, batches: int) -> NDArray[np.uint8]:
        """Return an uninitialised array for the images of `batches` batches; for a GPU, in page-locked memory.

        If CUDA refuses to lock memory, it is ordinary memory, which takes longer to copy.
        """
        if self._arena is not None:
            try:
                return self._arena.empty((batches * (self.batch_size or 1), *self.artifact.input_size, 3))
            except RuntimeError as error:  # also raised for a lost GPU, which `run` then reports
                logger.debug("memory cannot be page-locked: %s", error)
        return super().empty(batches)

    def _run(self, batch: Batch) -> dict[str, NDArray[np.uint8]]:
        if self._bindings is None:
            return dict(zip(self._outputs, self._session.run(None, {"image": batch}), strict=True))
        binding = self._bindings.get()
        try:
            return binding.run(batch, self._compute)
        finally:
            self._bindings.put(binding)

    def _compute(self, work: Callable[[], None]) -> None:
        self._threads.submit(work).result()

    def _bind(self, options: EngineOptions) -> SimpleQueue[Binding]:
        """Return the bindings after a warm-up of each: the first batch selects algorithms and allocates memory."""
        device = open_gpu(options.device)
        self.place, self._arena = device.place, Arena(device.allocate_host)
        self.streams = options.streams + 1
        bindings: SimpleQueue[Binding] = SimpleQueue()
        first: dict[str, NDArray[np.uint8]] = {}
        with CAPTURE:
            for number in range(self.streams):
                graph = number if options.cuda_graph else None
                binding = Binding(self._session, self.artifact, self.batch_size or 1, device, self._arena, graph)
                found = binding.warm_up(self._compute)
                first = first or found
                if any(np.abs(found[name].astype(np.int16) - first[name]).mean() > 1 for name in first):
                    remedy = "run it without a CUDA graph" if options.cuda_graph else "use another provider"
                    raise ProviderError(f"{self.provider} gives different results with different buffers: {remedy}")
                bindings.put(binding)
        return bindings

    def _explain(self, error: Exception, otherwise: CloudrtError) -> CloudrtError:
        """Return the exception to raise for one of ONNX Runtime: `MemoryExhausted`, or `otherwise` with a reason."""
        reason = brief(error)
        if exhausted(error):
            return MemoryExhausted(
                f"{self.provider} does not have enough memory for a batch of {self.batch_size or 'any size'}: {reason}"
            )
        remedy = f": {DIAGNOSIS}" if self.provider in GPU_PROVIDERS else ""
        return type(otherwise)(f"{otherwise}: {reason}{remedy}")

    def close(self) -> None:
        """Release the session's memory."""
        self._bindings = self._session = None
        self._threads.shutdown()

    def _check_placement(self, allow_cpu: bool) -> None:
        """Raise ProviderError if the session lacks the provider or, without `allow_cpu`, runs `HEAVY` on the CPU."""
        wanted = ORT_NAMES[self.provider]
        if wanted not in self._session.get_providers():
            raise ProviderError(
                f"provider {self.provider} was requested, but ONNX Runtime uses {self._session.get_providers()[0]}: "
                f"{DIAGNOSIS}"
            )
        if allow_cpu:
            return
        strayed = set()
        for part in self._session.get_provider_graph_assignment_info():
            if part.ep_name == ORT_NAMES["cpu"]:
                strayed |= {node.op_type for node in part.get_nodes()} & HEAVY
        if strayed:
            raise ProviderError(
                f"provider {self.provider} was requested, but ONNX Runtime placed {', '.join(sorted(strayed))} on "
                "the CPU: use `provider='cpu'` or another precision, or allow it with `allow_cpu=True`"
            )
