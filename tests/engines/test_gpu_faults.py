"""GPUs that are out of memory or lost: one line with a remedy, and no fallback to the CPU.

Stand-ins raise what ONNX Runtime raises, or make ONNX Runtime itself raise it.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as state
from support.plain import pictures
from support.tiny import SMALL_GRIDS, tiny_artifact, tiny_model, write_jpegs

from cloudrt.engines.base import EngineOptions, brief
from cloudrt.engines.candidates import FixedSettings, Setting
from cloudrt.engines.choice import open_engine
from cloudrt.engines.plan import Plan
from cloudrt.engines.trial import ProviderTrial
from cloudrt.errors import MemoryExhausted, ProviderError
from cloudrt.inference.pipeline import Segmenter
from cloudrt.inference.run import infer
from cloudrt.model.artifact import parse_artifact
from cloudrt.system.cuda import HostDevice
from cloudrt.system.nvidia import Driver

MODEL = tiny_model(labels=SMALL_GRIDS)
ARTIFACT = parse_artifact(MODEL, "model.onnx")
SESSION = onnxruntime.InferenceSession
WHERE = (
    "/onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:154 void onnxruntime::CudaCall(int, const char*) "
)
OUT_OF_MEMORY = f"{WHERE}CUDA failure 2: out of memory ; GPU=0 ; hostname=box ; expr=cudaMalloc((void**)&p, size); "
LOST = f"{WHERE}CUDA failure 719: unspecified launch failure ; GPU=0 ; hostname=box ; expr=cudaStreamSynchronize(s); "


class Gpu:
    """Opens sessions that report CUDA's provider and run on the CPU; `fault(batch_size)` returns an error to raise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fault: Any = lambda batch_size: None
        monkeypatch.setattr("cloudrt.engines.choice.problem", lambda name: None)
        monkeypatch.setattr("cloudrt.engines.session.load_libraries", lambda provider: None)
        monkeypatch.setattr("cloudrt.engines.session.onnxruntime.InferenceSession", self.open)
        monkeypatch.setattr("cloudrt.engines.onnxruntime.open_gpu", lambda number: HostDevice())
        driver = Driver((13, 0), ("NVIDIA H200, 140 GiB",), ((9, 0),))
        for module in ("system.machine", "engines.plan"):
            monkeypatch.setattr(f"cloudrt.{module}.nvidia_driver", lambda: driver)

    def open(self, content: bytes, options: Any, **_: Any) -> Any:
        session = SESSION(content, options, providers=["CPUExecutionProvider"])
        run = session.run_with_iobinding
        batch = session.get_inputs()[0].shape[0]

        def run_with_iobinding(binding: Any, options: Any) -> None:
            error = self.fault(batch)
            if error:
                raise error
            run(binding, options)

        session.run_with_iobinding = run_with_iobinding
        session.get_providers = lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
        session.get_provider_graph_assignment_info = list
        return session


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gpu:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Gpu(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("model") / "model.onnx", labels=SMALL_GRIDS)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jpegs(tmp_path_factory.mktemp("images"), 20)


def test_memory_that_runs_out_halves_the_batch(gpu: Gpu, model: Path) -> None:
    """IO binding raises a plain RuntimeError for everything."""
    images = pictures(20)
    with Segmenter(model, provider="cpu", batch_size=4) as segmenter:
        wanted = [result.rle for result in segmenter.predict(images)]
    runs: list[int] = []

    def fault(size: int) -> Exception | None:
        runs.append(size)
        return RuntimeError(OUT_OF_MEMORY) if size > 2 and runs.count(size) > 4 else None  # four of them warm up

    gpu.fault = fault
    with Segmenter(model, provider="cuda", plan=Plan("cuda", 8)) as segmenter:
        assert [result.rle for result in segmenter.predict(images)] == wanted
        assert segmenter.batch_size == 2


def test_memory_that_another_process_takes_halves_it_again(gpu: Gpu, model: Path) -> None:
    """Batches of 4 cannot even be opened when those of 8 have failed."""
    runs: list[int] = []

    def fault(size: int) -> Exception | None:
        runs.append(size)
        return RuntimeError(OUT_OF_MEMORY) if size == 4 or (size == 8 and runs.count(8) > 4) else None

    gpu.fault = fault
    with Segmenter(model, provider="cuda", plan=Plan("cuda", 8)) as segmenter:
        results = list(segmenter.predict(pictures(20)))
        assert segmenter.batch_size == 2
    assert len(results) == 20 and not any(result.error for result in results)


def test_a_batch_that_failed_holds_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the runtime would keep the session alive while a smaller one is opened."""

    class Full(onnxruntime.InferenceSession):  # type: ignore[misc]
        def __init__(self, content: bytes, options: object, **_: object) -> None:
            super().__init__(content, options, providers=["CPUExecutionProvider"])

        def run(self, *_: object) -> None:
            raise RuntimeError(OUT_OF_MEMORY)

    monkeypatch.setattr("cloudrt.engines.session.onnxruntime.InferenceSession", Full)
    engine = open_engine(MODEL, "cpu", 2)
    session = weakref.ref(engine._session)  # type: ignore[attr-defined]
    with pytest.raises(MemoryExhausted) as caught:
        engine.run(np.zeros((2, 64, 96, 3), np.uint8))
    engine.close()
    assert session() is None
    assert "out of memory" in str(caught.value.__cause__)


def test_an_engine_that_cannot_be_opened_holds_no_memory(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the buffers, which are allocated on the device outside ONNX Runtime, nor the session are kept."""
    held: list[weakref.ref[Any]] = []

    class Counted(HostDevice):
        def allocate(self, size: int) -> Any:
            memory = super().allocate(size)
            held.append(weakref.ref(memory))
            return memory

    monkeypatch.setattr("cloudrt.engines.onnxruntime.open_gpu", lambda number: Counted())
    opened, sessions = gpu.open, []

    def open_session(*given: Any, **named: Any) -> Any:
        session = opened(*given, **named)
        sessions.append(weakref.ref(session))
        return session

    monkeypatch.setattr("cloudrt.engines.session.onnxruntime.InferenceSession", open_session)
    gpu.fault = lambda size: RuntimeError(OUT_OF_MEMORY)
    with pytest.raises(MemoryExhausted) as caught:
        open_engine(MODEL, "cuda", 4)
    gc.collect()  # the stand-in's methods refer to the session
    assert len(held) == 2 and not any(one() for one in held)
    assert len(sessions) == 1 and sessions[0]() is None
    assert "out of memory" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    "error", [RuntimeError(LOST), state.EPFail("[ONNXRuntimeError] : 11 : EP_FAIL : the GPU is lost")], ids=repr
)
def test_a_gpu_that_is_lost_ends_the_run_and_resume_finishes_it(
    gpu: Gpu,
    model: Path,
    images: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    monkeypatch.setattr(ProviderTrial, "measure_settings", lambda *_: [Setting(4, images_per_s=10.0)])
    wanted = tmp_path / "wanted.csv"
    infer(images, wanted, model, provider="cuda", batch_size=4)
    runs: list[int] = []

    def fault(size: int) -> Exception | None:
        runs.append(size)
        return error if len(runs) > 6 else None  # four of them warm up

    gpu.fault = fault
    output = tmp_path / "submission.csv"
    with pytest.raises(ProviderError, match=r"cuda failed on a batch of 4: .*: cloudrt doctor") as caught:
        infer(images, output, model, provider="cuda", batch_size=4)
    assert "\n" not in str(caught.value) and "onnxruntime_src" not in str(caught.value)
    assert not output.exists() and output.with_name("submission.csv.journal").exists()
    assert "`resume=True` continues from there" in caplog.text
    gpu.fault = lambda batch_size: None
    assert infer(images, output, model, provider="cuda", batch_size=4, resume=True).images == 20
    assert output.read_bytes() == wanted.read_bytes()


def test_a_gpu_that_is_lost_outside_the_session_has_the_same_error(
    gpu: Gpu, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA then refuses copies, and page-locked memory for the next batches."""
    lost: list[bool] = []

    class Lost(HostDevice):
        def allocate_host(self, size: int) -> Any:
            if lost:
                raise RuntimeError("CUDA failure 719: unspecified launch failure ; cudaHostAlloc")
            return super().allocate_host(size)

        def copy(self, target: int, source: int, size: int, stream: None) -> None:
            if lost:
                raise RuntimeError("CUDA failure 719: unspecified launch failure ; cudaMemcpyAsync")
            super().copy(target, source, size, stream)

    monkeypatch.setattr("cloudrt.engines.onnxruntime.open_gpu", lambda number: Lost())
    with Segmenter(model, provider="cuda", plan=Plan("cuda", 4)) as segmenter:
        lost.append(True)
        words = r"^cuda failed on a batch of 4: CUDA failure 719: unspecified launch failure: cloudrt doctor"
        with pytest.raises(ProviderError, match=words):
            list(segmenter.predict([np.zeros((64, 96, 3), np.uint8)] * 20))


def test_onnxruntime_does_not_fall_back_to_the_cpu_by_itself(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`InferenceSession.run` would open the model again on the CPU after the failure of a provider."""
    moved: list[object] = []
    monkeypatch.setattr(SESSION, "set_providers", lambda self, *words: moved.append(words))
    with open_engine(model, "cpu", 2) as engine:

        class Failing:
            def is_webgpu_graph_capture_enabled(self) -> bool:
                return False

            def run(self, *_: object) -> None:
                raise state.EPFail("[ONNXRuntimeError] : 11 : EP_FAIL : the provider failed")

        monkeypatch.setattr(engine._session, "_sess", Failing())  # type: ignore[attr-defined]
        with pytest.raises(ProviderError, match="the provider failed"):
            engine.run(np.zeros((2, 64, 96, 3), np.uint8))
    assert not moved


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (OUT_OF_MEMORY, "CUDA failure 2: out of memory"),
        ("[ONNXRuntimeError] : 11 : EP_FAIL : the GPU is lost", "the GPU is lost"),
        (
            "/onnxruntime_src/onnxruntime/python/onnxruntime_pybind_state.cc:1010 std::shared_ptr<F> "
            "python::Create(const O&, std::string&) [ERROR] [TensorRT] The value for the key 'k' should be 'True'",
            "[ERROR] [TensorRT] The value for the key 'k' should be 'True'",
        ),
        ("", "RuntimeError"),
    ],
)
def test_errors_are_brief(text: str, wanted: str) -> None:
    assert brief(RuntimeError(text)) == wanted


@pytest.mark.parametrize("refused", ["cuda_graph", "channels_last", "streams"])
def test_a_setting_that_is_refused_does_not_end_the_trial(monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    def open_one(self: ProviderTrial, provider: str, precision: str, setting: Setting) -> Any:
        if getattr(setting, refused) > 1 or getattr(setting, refused) is True:
            raise ProviderError(f"{refused} is refused")
        options = EngineOptions(streams=setting.streams)
        return open_engine(MODEL, "cpu", setting.batch_size, 1, options)

    monkeypatch.setattr(ProviderTrial, "open", open_one)
    monkeypatch.setattr("cloudrt.engines.trial.SHORTEST_S", 1e-6)
    trial = ProviderTrial(MODEL, ARTIFACT, 1)
    settings = trial.measure_settings("cuda", "fp32", FixedSettings(batch_size=2))
    assert settings and not any(
        getattr(setting, refused) > 1 or getattr(setting, refused) is True for setting in settings
    )


def test_a_provider_that_runs_nothing_says_why(gpu: Gpu, model: Path) -> None:
    gpu.fault = lambda batch_size: RuntimeError(LOST)
    with pytest.raises(ProviderError, match="CUDA failure 719") as caught:
        Segmenter(model, provider="cuda")
    assert not isinstance(caught.value, MemoryExhausted)
    with Segmenter(model, provider="auto") as segmenter:
        assert segmenter.plan.provider != "cuda"
        assert "CUDA failure 719" in segmenter.plan.passed_over["cuda"]
