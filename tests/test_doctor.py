"""`cloudrt doctor`: every provider is tried, failures come with a remedy, and no output of libraries is shown."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from support.gpu_session import OnTheCpu, stand_in_for_a_gpu
from support.tiny import tiny_artifact, tiny_model

from cloudrt import doctor as doctor_module
from cloudrt.cli.doctor import doctor as command
from cloudrt.doctor import (
    UNTESTED,
    Diagnosis,
    ProviderState,
    build_graph,
    diagnose,
    find_conflicts,
    provider_state,
    try_provider,
)
from cloudrt.engines.availability import NAMES, problem
from cloudrt.engines.base import Engine
from cloudrt.engines.choice import open_engine
from cloudrt.engines.onnxruntime import OrtEngine
from cloudrt.engines.plan import Plan
from cloudrt.inference import model_source
from cloudrt.inference.pipeline import Segmenter
from cloudrt.model.artifact import Artifact, parse_artifact, write_metadata
from cloudrt.model.onnx_file import graph_bytes
from cloudrt.system.machine import Machine, describe_machine
from cloudrt.system.nvidia import Driver
from cloudrt.system.versions import installed_distributions

GPU = Driver((13, 0), ("NVIDIA H200, 140 GiB",))


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    return diagnose()


def test_diagnosis_of_this_machine(diagnosis: Diagnosis) -> None:
    assert {"python", "cloudrt", "numpy", "onnx", "opencv-python-headless"} <= set(diagnosis.versions)
    assert [state.name for state in diagnosis.providers] == list(NAMES)
    cpu = diagnosis.providers[-1]
    assert cpu == ProviderState("cpu", True)
    assert all(state.works or (state.reason and state.remedy) for state in diagnosis.providers)
    assert json.loads(json.dumps(diagnosis.to_dict()))["machine"]["cores"] == diagnosis.machine.cores >= 1
    assert diagnosis.machine.memory > 0 and diagnosis.machine.cpu


@pytest.mark.parametrize("name", NAMES)
def test_problem_and_trial_agree(name: str, diagnosis: Diagnosis) -> None:
    state = diagnosis.providers[NAMES.index(name)]
    found = problem(name)
    assert state.works == (found is None), state
    if found is not None:
        assert found == f"{state.reason}: {state.remedy}"


@pytest.mark.cuda
@pytest.mark.skipif(problem("cuda") is not None, reason="needs an NVIDIA GPU with CUDA")
def test_cuda_works() -> None:
    assert provider_state("cuda") == ProviderState("cuda", True)


def test_the_trial_graph_is_valid_at_opset_18() -> None:
    model = build_graph()
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == 10 and [entry.version for entry in model.opset_import] == [18]


def test_a_wrong_answer_and_an_error_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert try_provider("cpu") is None
    with monkeypatch.context() as patch:
        patch.setattr(OrtEngine, "probability", lambda self, batch: np.zeros((1, 1, 8, 8), np.uint8))
        assert "wrong result" in str(try_provider("cpu"))

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : driver version is insufficient")

    monkeypatch.setattr("onnxruntime.InferenceSession", refuse)
    assert str(try_provider("cpu")).endswith("driver version is insufficient")


@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_the_trial_opens_what_infer_opens(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same function with the same options, so that an option that a provider refuses is found here."""
    if problem(provider):
        pytest.skip("not installed")
    opened: list[object] = []

    def record(model: Any, *settings: Any) -> Engine:
        opened.append(settings)
        return open_engine(model, *settings)

    assert vars(doctor_module)["open_engine"] is vars(model_source)["open_engine"] is open_engine
    monkeypatch.setattr("cloudrt.doctor.open_engine", record)
    assert try_provider(provider) is None
    assert opened == [(provider, 1, 1, Plan(provider, 1).options())]


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_the_trial_gives_a_gpu_provider_the_options_of_infer(
    provider: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All but the shapes and the cache folder, which depend on the artifact."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stand_in_for_a_gpu(monkeypatch)
    asked: list[list[tuple[str, dict[str, str]]]] = []

    class Noted(OnTheCpu):
        def __init__(self, content: bytes, options: object, providers: Any, enable_fallback: int) -> None:
            super().__init__(content, options, providers, enable_fallback)
            asked.append(
                [
                    (name, {key: value for key, value in chosen.items() if not key.endswith(("_shapes", "_path"))})
                    for name, chosen in providers
                ]
            )

        def get_providers(self) -> list[str]:
            return [name for name, _ in self.asked]

    monkeypatch.setattr("cloudrt.engines.session.onnxruntime.InferenceSession", Noted)
    monkeypatch.setattr("cloudrt.engines.choice.problem", lambda name: None)
    assert try_provider(provider) is None
    with Segmenter(tiny_artifact(tmp_path / "m.onnx"), plan=Plan(provider, 4)):
        ours, theirs = asked
    assert ours == theirs and len(ours[0][1]) >= 5


def test_an_option_that_a_provider_refuses_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls the option parser of ONNX Runtime's TensorRT provider directly.

    `InferenceSession` reaches it only where TensorRT's libraries can be loaded.
    """
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    if "TensorrtExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("built without TensorRT")

    def open_session(content: bytes, settings: Any, providers: Any, enable_fallback: int) -> None:
        session = state.InferenceSession(settings, content, False, False)
        session.initialize_session([providers[0][0]], [providers[0][1]], set())

    monkeypatch.setattr("cloudrt.engines.session.load_libraries", lambda provider: None)
    monkeypatch.setattr("cloudrt.engines.choice.problem", lambda name: None)
    monkeypatch.setattr("cloudrt.engines.session.onnxruntime.InferenceSession", open_session)
    monkeypatch.setattr("cloudrt.engines.session.provider_options", lambda *_: {"trt_cuda_graph_enable": "1"})
    assert "should be 'True' or 'False'" in str(try_provider("tensorrt"))


def test_trial_that_fails_crashes_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    def trial(code: str) -> ProviderState:
        monkeypatch.setattr(doctor_module, "_TRIAL", code)
        return provider_state("cpu")

    assert trial("import sys; print('loud', file=sys.stderr); sys.exit('no such thing')").reason == "no such thing"
    assert trial("raise SystemExit(3)").reason == "ended with status 3"
    if sys.platform != "win32":
        assert trial("import os; os.kill(os.getpid(), 11)").reason == "crashed (SIGSEGV)"
    monkeypatch.setattr(doctor_module, "_TIMEOUT_S", 0.2)
    hung = trial("import time; time.sleep(20)")
    assert not hung.works and "did not finish" in hung.reason and hung.remedy.startswith("pip install")


def test_double_installs() -> None:
    assert find_conflicts({"onnxruntime-gpu", "opencv-python-headless", "numpy"}) == []
    runtime, opencv = find_conflicts({"onnxruntime", "onnxruntime-gpu", "opencv-python", "opencv-python-headless"})
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime" in runtime
    assert opencv.endswith(
        "pip uninstall -y opencv-python-headless opencv-python && pip install opencv-python-headless"
    )
    assert "cloudrt" in installed_distributions()


def test_an_idle_gpu_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloudrt.system.machine.nvidia_driver", lambda: GPU)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    states = (
        ProviderState("tensorrt", False, "no", "a"),
        ProviderState("cuda", False, "libcudnn.so.9 not found", "pip install '.[cuda]'"),
        ProviderState("openvino", False, "OpenVINO is not installed", "pip install '.[openvino]'"),
        ProviderState("cpu", True),
    )
    gpu, openvino = doctor_module._advice(states, describe_machine())
    assert gpu.endswith("pip install '.[cuda]'") and openvino.endswith("pip install '.[openvino]'")


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> Diagnosis:
    """A diagnosis that needs no trials."""
    states = (ProviderState("cuda", False, "no [bold]GPU", "pip install '.[cuda]'"), ProviderState("cpu", True))
    machine = Machine("Linux", "CPU", ("avx2",), 2, 8.0, ())
    found = Diagnosis({"python": "3.11"}, machine, states, ("a conflict: pip " + "x" * 120,), (), UNTESTED)
    monkeypatch.setattr(doctor_module, "diagnose", lambda: found)
    return found


def test_command_prints_remedies_on_single_lines(untried: Diagnosis) -> None:
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    assert "For cuda: pip install '.[cuda]'" in lines
    assert untried.conflicts[0] in lines  # longer than the terminal, and still one line
    assert any("TensorRT" in line and "cloudrt.bench.gpu" in line for line in lines)
    assert "no: no [bold]GPU" in result.stdout and "works" in result.stdout


def test_command_prints_json(untried: Diagnosis) -> None:
    result = CliRunner().invoke(command, ["--json"])
    assert json.loads(result.stdout) == json.loads(json.dumps(untried.to_dict()))


def test_command_shows_an_artifact(untried: Diagnosis, monkeypatch: pytest.MonkeyPatch) -> None:
    described = Artifact(encoder="resnet50", versions={"torch": "2.15"})
    monkeypatch.setattr("cloudrt.model.artifact.read_artifact", lambda path: described)
    result = CliRunner().invoke(command, ["model.onnx"])
    assert result.exit_code == 0 and "resnet50" in result.stdout and "model.onnx" in result.stdout
    values = json.loads(CliRunner().invoke(command, ["model.onnx", "--json"]).stdout)
    assert values["model"] == json.loads(json.dumps(described.to_dict()))


def test_command_refuses_files_that_are_not_artifacts(tmp_path: Path) -> None:
    missing = CliRunner().invoke(command, [str(tmp_path / "none.onnx")])
    assert missing.exit_code == 2 and "none.onnx is missing" in missing.stderr
    (tmp_path / "plain.onnx").write_bytes(graph_bytes(build_graph()))
    plain = CliRunner().invoke(command, [str(tmp_path / "plain.onnx")])
    assert plain.exit_code == 2 and "no cloudrt metadata" in plain.stderr and len(plain.stderr.splitlines()) == 1


def test_doctor_loads_no_runtime_itself() -> None:
    code = "import sys, cloudrt.doctor; print({'torch', 'onnxruntime', 'openvino', 'onnx'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_escapes_in_the_metadata_are_not_printed(untried: Diagnosis, tmp_path: Path) -> None:
    model = tiny_model()
    escape = "\x1b]0;title\x07"
    artifact = replace(
        parse_artifact(model, "m"), versions={escape: escape}, members=[{"encoder": escape}], parity={"source": escape}
    )
    write_metadata(model, artifact)
    onnx.save(model, tmp_path / "m.onnx")
    for words in ([], ["--json"]):
        result = CliRunner().invoke(command, [str(tmp_path / "m.onnx"), *words])
        assert result.exit_code == 0, result.output
        assert "title" in result.output and "\x1b" not in result.output and "\x07" not in result.output


def test_providers_that_cannot_run_the_artifact_are_listed(untried: Diagnosis, tmp_path: Path) -> None:
    model = tiny_model()
    artifact = replace(parse_artifact(model, "m"), precision="int8", int8_target="tensorrt")
    write_metadata(model, artifact)
    onnx.save(model, tmp_path / "m.onnx")
    result = CliRunner().invoke(command, [str(tmp_path / "m.onnx")])
    assert result.exit_code == 0, result.output
    assert "works; not for this artifact: its int8 layers are quantised for TensorRT" in " ".join(
        result.stdout.replace("│", " ").split()
    )
    values = json.loads(CliRunner().invoke(command, [str(tmp_path / "m.onnx"), "--json"]).stdout)
    assert set(values["not_for_this_model"]) == {"cuda", "openvino", "cpu"}


def test_the_doctor_does_not_advise_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors of a GPU do; the doctor says instead how to find what to repair."""
    text = "cuda cannot open the model: CUDA failure 36: cloudrt doctor checks the driver and the libraries"
    monkeypatch.setattr("cloudrt.doctor.obstacle", lambda name: None)
    monkeypatch.setattr("cloudrt.doctor._TRIAL", f"import sys; sys.exit({text!r})")
    state = doctor_module.provider_state("cuda")
    assert not state.works and state.reason == "cuda cannot open the model: CUDA failure 36"
    assert state.remedy.startswith("if nvidia-smi fails, repair the driver; otherwise pip install")
