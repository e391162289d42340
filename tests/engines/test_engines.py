"""Engines: equal outputs in every provider, a fixed batch size, and only the requested provider."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto
from support.tiny import SMALL_GRIDS, tiny_artifact, tiny_model

from cloudrt.data.scenes import draw_scene
from cloudrt.engines.availability import problem
from cloudrt.engines.base import BATCH_SIZES, EngineOptions
from cloudrt.engines.choice import Choice, choose_provider, open_engine
from cloudrt.engines.onnxruntime import OrtEngine
from cloudrt.engines.session import provider_options, session_options
from cloudrt.engines.widen import widen
from cloudrt.errors import ArtifactError, DataError, ProviderError
from cloudrt.model.artifact import Artifact, parse_artifact
from cloudrt.options import PROVIDERS

SIZE = (64, 96)
LABELS = SMALL_GRIDS
needs_openvino = pytest.mark.skipif(not find_spec("openvino"), reason="OpenVINO is not installed")
LOCAL = ["cpu", pytest.param("openvino", marks=needs_openvino)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("model") / "model.onnx", SIZE, LABELS, presence=True)


@pytest.fixture(scope="module")
def batch() -> NDArray[np.uint8]:
    return np.stack([draw_scene(seed, SIZE).image for seed in range(3)])


def test_a_cuda_graph_needs_a_fixed_batch_size(model: Path) -> None:
    with pytest.raises(DataError, match="a CUDA graph needs a fixed batch size"):
        open_engine(model, "cpu", None, options=EngineOptions(cuda_graph=True))


def plain(model: onnx.ModelProto, batch: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The outputs of ONNX Runtime, called as its documentation shows."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[NDArray[np.uint8]] = session.run(None, {"image": batch})
    return found


@pytest.mark.parametrize("provider", LOCAL)
@pytest.mark.parametrize("batch_size", [3, None])
def test_answers_are_those_of_a_plain_session(
    model: Path, batch: NDArray[np.uint8], provider: str, batch_size: int | None
) -> None:
    probability, presence = plain(onnx.load(model), batch)
    with open_engine(model, provider, batch_size) as engine:
        assert engine.provider == provider
        assert engine.batch_size == batch_size
        found, found_presence = engine.run(batch)
        assert (engine.probability(batch) == found).all()
    assert found.dtype == np.uint8
    assert found.shape == (3, 3, 90, 60)
    # OpenVINO's sigmoid may differ by one level.
    assert np.abs(found.astype(int) - probability).max() <= (provider == "openvino")
    assert found_presence is not None
    assert np.abs(found_presence.astype(int) - presence).max() <= (provider == "openvino")
    assert 0 < (found > 127).mean() < 1


@pytest.mark.parametrize("provider", LOCAL)
def test_answers_stay_when_the_engine_runs_again(model: Path, batch: NDArray[np.uint8], provider: str) -> None:
    """An engine that reused its output buffers would change what an earlier call returned."""
    with open_engine(model, provider, 3) as engine:
        first = engine.probability(batch)
        kept = first.copy()
        engine.probability(np.zeros_like(batch))
        assert (first == kept).all()


@pytest.mark.parametrize("provider", LOCAL)
def test_no_presence_is_none(provider: str, batch: NDArray[np.uint8]) -> None:
    with open_engine(tiny_model(SIZE, LABELS), provider, 3) as engine:
        assert engine.run(batch)[1] is None


@pytest.mark.parametrize("provider", LOCAL)
def test_other_batches_are_refused(model: Path, batch: NDArray[np.uint8], provider: str) -> None:
    with open_engine(model, provider, 3) as engine:
        wrongs: list[Any] = [batch[:2], batch[:, :32], batch.astype(np.float32), batch[0]]
        for wrong in wrongs:
            with pytest.raises(DataError, match=r"\(3, 64, 96, 3\)"):
                engine.run(wrong)


@pytest.mark.parametrize("provider", LOCAL)
def test_batches_need_not_be_contiguous(model: Path, batch: NDArray[np.uint8], provider: str) -> None:
    with open_engine(model, provider, 3) as engine:
        assert (engine.probability(batch[::-1]) == engine.probability(batch)[::-1]).all()


@pytest.mark.parametrize("provider", LOCAL)
def test_closing_twice_is_fine(model: Path, provider: str) -> None:
    with open_engine(model, provider) as engine:
        engine.close()


def test_the_default_batch_size_is_the_providers(model: Path) -> None:
    with open_engine(model, "cpu") as engine:
        assert engine.batch_size == BATCH_SIZES["cpu"]
    assert set(BATCH_SIZES) == set(PROVIDERS) - {"auto"}
    with pytest.raises(DataError, match="must be 0 or more"):
        open_engine(model, "cpu", -1)


def test_a_provider_that_cannot_run_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other provider is used instead; the error says what to install."""
    monkeypatch.setattr("cloudrt.engines.choice.problem", lambda name: f"no {name} here: pip install '.[{name}]'")
    for provider in ("cuda", "tensorrt", "openvino"):
        with pytest.raises(ProviderError, match=rf"provider {provider} .*pip install '\.\[{provider}\]'"):
            open_engine(model, provider)
    with pytest.raises(ProviderError, match=r"no provider named 'gpu'; known: auto, tensorrt"):
        choose_provider("gpu")


def test_auto_says_what_it_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "cloudrt.engines.choice.problem", lambda name: None if name in ("cpu", "openvino") else f"no {name}"
    )
    choice = choose_provider()
    assert choice.provider == "cpu"
    assert choice.passed_over["cuda"] == "no cuda"
    assert choice.passed_over["tensorrt"] == "no tensorrt"
    assert "request provider openvino" in choice.passed_over["openvino"]
    monkeypatch.setattr("cloudrt.engines.choice.problem", lambda _name: None)
    choice = choose_provider()
    assert choice.provider == "cuda"
    assert "request provider tensorrt" in choice.passed_over["tensorrt"]
    assert choose_provider("cpu") == Choice("cpu", {})


@pytest.mark.parametrize(
    ("target", "provider", "reason"),
    [
        ("cpu", "cuda", "no int8 convolutions on CUDA"),
        ("tensorrt", "cuda", "no int8 convolutions on CUDA"),
        ("tensorrt", "cpu", "quantised for TensorRT: export it with cloudrt-export --int8-target cpu"),
        ("tensorrt", "openvino", "quantised for TensorRT"),
        ("cpu", "tensorrt", "does not support asymmetric int8"),
    ],
)
def test_a_provider_that_would_emulate_int8_is_refused(
    monkeypatch: pytest.MonkeyPatch, target: str, provider: str, reason: str
) -> None:
    monkeypatch.setattr("cloudrt.engines.choice.problem", lambda _: None)  # as if everything worked here
    with pytest.raises(ProviderError, match=reason):
        choose_provider(provider, Artifact(precision="int8", int8_target=target))


def test_auto_skips_providers_that_would_emulate_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloudrt.engines.choice.problem", lambda _: None)
    choice = choose_provider("auto", Artifact(precision="int8", int8_target="cpu"))
    assert choice.provider == "cpu"
    assert "fp16 artifact" in choice.passed_over["cuda"]
    assert choose_provider("auto", Artifact(precision="fp16")).provider == "cuda"
    with pytest.raises(ProviderError, match="no provider here runs this artifact"):
        choose_provider("auto", Artifact(precision="int8", int8_target="tensorrt"))


def test_a_session_in_another_provider_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If CUDA cannot be loaded, ONNX Runtime uses the CPU without an error; the engine detects this and fails."""
    real = onnxruntime.InferenceSession

    def on_the_cpu(content: bytes, options: object, providers: object, enable_fallback: int) -> object:
        return real(content, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", on_the_cpu)
    monkeypatch.setattr("cloudrt.engines.session.load_libraries", lambda provider: None)
    proto = onnx.load(model)
    with pytest.raises(ProviderError, match="cuda was requested, but ONNX Runtime uses CPUExecutionProvider"):
        OrtEngine(proto, parse_artifact(proto, model), "cuda", 4, 1)


def test_heavy_nodes_on_the_cpu_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = onnxruntime.InferenceSession

    class Strayed:
        """A session that reports CUDA's provider, with its nodes on the CPU."""

        def __init__(self, content: bytes, options: object, providers: object, enable_fallback: int) -> None:
            self.session = real(content, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

        def get_provider_graph_assignment_info(self) -> object:
            return self.session.get_provider_graph_assignment_info()

    monkeypatch.setattr(onnxruntime, "InferenceSession", Strayed)
    monkeypatch.setattr("cloudrt.engines.session.load_libraries", lambda provider: None)
    proto = onnx.load(model)
    with pytest.raises(ProviderError, match=r"placed Conv, Resize on the CPU"):
        OrtEngine(proto, parse_artifact(proto, model), "cuda", 4, 1)


def test_options_of_cuda_and_tensorrt() -> None:
    artifact = Artifact(input_size=SIZE)
    cuda = provider_options("cuda", artifact, 8, b"model")
    assert cuda["cudnn_conv_algo_search"] == "HEURISTIC"
    assert provider_options("cpu", artifact, 8, b"model") == {}
    tensorrt = provider_options("tensorrt", artifact, 8, b"model")
    assert tensorrt["trt_engine_cache_enable"] == "True"  # the others: test_tensorrt.py
    assert all(isinstance(value, str) for value in (cuda | tensorrt).values())


def test_threads_are_those_asked_for() -> None:
    options = session_options("cpu", 4, 3)
    assert options.intra_op_num_threads == 3
    assert options.inter_op_num_threads == 1


def test_widening_keeps_the_answers_and_drops_fp16(batch: NDArray[np.uint8]) -> None:
    half = tiny_model(SIZE, LABELS, precision="fp16")
    before = half.SerializeToString()
    wide = widen(half)
    assert half.SerializeToString() == before
    onnx.checker.check_model(wide, full_check=True)
    assert [p.value for p in wide.metadata_props] == [p.value for p in half.metadata_props]
    kinds = {tensor.data_type for tensor in wide.graph.initializer}
    kinds |= {attribute.i for node in wide.graph.node for attribute in node.attribute if attribute.name == "to"}
    assert TensorProto.FLOAT16 not in kinds
    exact, rounded = plain(wide, batch)[0].astype(int), plain(half, batch)[0].astype(int)
    # fp16 rounds logits of up to 25, which changes levels by at most 2.
    assert np.abs(exact - rounded).max() <= 2
    single = tiny_model(SIZE, LABELS)
    assert widen(single) == single


def test_fp16_in_openvino_is_the_widened_graph(batch: NDArray[np.uint8]) -> None:
    pytest.importorskip("openvino")
    half = tiny_model(SIZE, LABELS, precision="fp16")
    with open_engine(half, "openvino", len(batch)) as engine, open_engine(widen(half), "openvino", len(batch)) as wide:
        np.testing.assert_array_equal(engine.run(batch)[0], wide.run(batch)[0])


def test_fp16_is_widened_on_the_cpu_unless_emulated(batch: NDArray[np.uint8]) -> None:
    half = tiny_model(SIZE, LABELS, precision="fp16")
    with open_engine(half, "cpu", None) as engine:
        assert (engine.probability(batch) == plain(widen(half), batch)[0]).all()
    with open_engine(half, "cpu", None, options=EngineOptions(emulate=True)) as engine:
        assert (engine.probability(batch) == plain(half, batch)[0]).all()


@pytest.mark.parametrize("provider", LOCAL)
def test_a_graph_that_the_runtime_refuses_is_one_line(provider: str) -> None:
    broken = tiny_model(SIZE, LABELS)
    next(node for node in broken.graph.node if node.op_type == "Sigmoid").op_type = "Sigmoidal"
    with pytest.raises(ArtifactError, match="refuses the model") as caught:
        open_engine(broken, provider)
    assert "\n" not in str(caught.value)


@pytest.mark.cuda
@pytest.mark.skipif(problem("cuda") is not None, reason="needs an NVIDIA GPU with CUDA")
def test_cuda_answers_as_the_cpu_does(model: Path, batch: NDArray[np.uint8]) -> None:
    wanted = plain(onnx.load(model), batch)[0].astype(int)
    with open_engine(model, "cuda", 3) as engine:
        assert np.abs(engine.probability(batch) - wanted).max() <= 1


def test_the_reason_of_openvino_is_the_last_line_that_is_not_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("openvino")

    def refuse(*_: object) -> None:
        raise RuntimeError("Exception from core.cpp:117:\nException from plugin.cpp:54:\nbad combination\n\n")

    monkeypatch.setattr(openvino.Core, "compile_model", refuse)
    with pytest.raises(ArtifactError, match=r"^OpenVINO refuses the model: bad combination$"):
        open_engine(tiny_model(), "openvino", 1)
