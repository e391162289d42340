"""Buffers on a device, and the errors of the runtimes when its memory is exhausted."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as state
from support.gpu_session import OnTheCpu, stand_in_for_a_gpu
from support.plain import SIZE

from cloudrt.engines.base import EngineOptions, exhausted
from cloudrt.engines.choice import open_engine
from cloudrt.engines.onnxruntime import REFUSALS, OrtEngine
from cloudrt.errors import MemoryExhausted
from cloudrt.model.artifact import parse_artifact
from cloudrt.model.onnx_file import load_model
from cloudrt.system.cuda import CAPTURE, HostDevice


@pytest.mark.parametrize(
    "text",
    [
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : BFCArena::AllocateRawInternal(size_t, bool) Available memory of "
        "2048 is smaller than requested bytes of 4096",
        "CUDA failure 2: out of memory ; GPU=0 ; hostname=box ; expr=cudaMalloc((void**)&p, size);",
        "CUDNN failure 4: CUDNN_STATUS_ALLOC_FAILED",
        "Failed to allocate memory for requested buffer of size 1073741824",
        "std::bad_alloc",
    ],
)
def test_out_of_memory_errors_are_recognised(model: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    assert exhausted(RuntimeError(text))
    assert not exhausted(RuntimeError("Invalid graph"))
    with open_engine(model, "cpu", 2) as engine:

        class Session:
            def run(self, *_: object) -> None:
                raise state.RuntimeException(text)

        monkeypatch.setattr(engine, "_session", Session())
        with pytest.raises(MemoryExhausted, match="cpu does not have enough memory for a batch of 2"):
            engine.run(np.zeros((2, *SIZE, 3), np.uint8))


def test_errors_of_onnxruntime_itself_are_recognised() -> None:
    """An output of 2**50 bytes: `run` raises a type of its own, IO binding a plain RuntimeError."""
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("ConstantOfShape", ["shape"], ["zeros"])],
        "large",
        [helper.make_tensor_value_info("shape", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("zeros", TensorProto.FLOAT, ["n"])],
    )
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    session = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    binding, shape = session.io_binding(), np.array([2**48], np.int64)
    binding.bind_cpu_input("shape", shape)
    binding.bind_output("zeros")
    with pytest.raises(REFUSALS) as from_run:
        session.run(None, {"shape": shape})
    with pytest.raises(RuntimeError) as from_binding:
        session.run_with_iobinding(binding)
    assert type(from_binding.value) is RuntimeError and type(from_run.value) is not RuntimeError
    assert exhausted(from_run.value) and exhausted(from_binding.value)


def test_a_batch_is_copied_once_in_each_direction(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []

    class Counted(HostDevice):
        def copy(self, target: int, source: int, size: int, stream: None) -> None:
            copied.append(size)
            super().copy(target, source, size, stream)

    stand_in_for_a_gpu(monkeypatch, Counted())
    loaded = load_model(model)
    with OrtEngine(loaded, parse_artifact(loaded, model), "cuda", 4, 1) as engine:
        batch = engine.empty(1)
        batch[...] = 7
        copied.clear()
        probability, presence = engine.run(batch)
    assert presence is not None
    assert copied[0] == batch.nbytes and sorted(copied[1:]) == sorted((probability.nbytes, presence.nbytes))


def test_nothing_is_allocated_while_a_graph_is_captured(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two runs of each of the two bindings may capture: they hold the lock that allocations take."""
    held: list[bool] = []
    run = OnTheCpu.run_with_iobinding

    def look(self: OnTheCpu, *words: Any) -> None:
        free = CAPTURE.acquire(blocking=False)
        if free:
            CAPTURE.release()
        held.append(not free)
        run(self, *words)

    stand_in_for_a_gpu(monkeypatch)
    monkeypatch.setattr(OnTheCpu, "run_with_iobinding", look)
    loaded = load_model(model)
    with OrtEngine(loaded, parse_artifact(loaded, model), "cuda", 4, 1, EngineOptions(cuda_graph=True)) as engine:
        engine.run(np.zeros((4, *SIZE, 3), np.uint8))
    assert held == [True] * 4 + [False]


OPTIONS = [
    EngineOptions(),
    EngineOptions(streams=3),
    EngineOptions(cuda_graph=True),
    EngineOptions(pinned=False, streams=2),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_buffers_on_a_device_give_a_plain_sessions_answers(
    model: Path, monkeypatch: pytest.MonkeyPatch, options: EngineOptions
) -> None:
    """The device is host memory here, and the session runs on the CPU."""
    from concurrent.futures import ThreadPoolExecutor

    import onnx

    proto = onnx.load(model)
    plain = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    stand_in_for_a_gpu(monkeypatch)
    random = np.random.default_rng(0)
    batches = [random.integers(0, 256, (4, *SIZE, 3), np.uint8) for _ in range(12)]
    with OrtEngine(proto, parse_artifact(proto, model), "cuda", 4, 1, options) as engine:
        assert engine.streams == options.streams + options.pinned
        with ThreadPoolExecutor(engine.streams) as pool:
            answers = list(pool.map(engine.run, batches))
        ran, graphs = engine._session.threads, engine._session.graphs
        assert engine._session.most <= options.streams
        assert engine._session.asked[0][1]["enable_cuda_graph"] == str(int(options.cuda_graph))
    for batch, (probability, presence) in zip(batches, answers, strict=True):
        wanted = plain.run(["probability", "presence"], {"image": batch})
        assert (probability == wanted[0]).all()
        assert presence is not None and (presence == wanted[1]).all()
    if options.cuda_graph:
        assert len(ran) == 1 and threading.get_ident() not in ran  # the thread that captured it, and no other
        assert graphs == {"0", "1"}  # each for its own buffers
