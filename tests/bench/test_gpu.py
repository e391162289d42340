"""The command that measures a GPU, run on the CPU: steps are recorded whether they finish, fail, crash or hang."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cloudrt.bench import gpu, gpu_pipeline, gpu_process, gpu_steps, gpu_task
from cloudrt.bench.gpu_process import GpuStep
from cloudrt.bench.gpu_task import GpuTask, NotRun, Part
from support.gpu_session import OnTheCpu, stand_in_for_a_gpu
from support.networks import OPTIONS
from support.tiny import tiny_model

from cloudrt.model.artifact import parse_artifact, write_metadata
from cloudrt.system.cuda import HostDevice
from cloudrt.system.files import sha256
from cloudrt.system.machine import describe_machine
from cloudrt.system.nvidia import nvidia_driver

NAMES = [step.name for step in gpu.STEPS]


def run(out: Path, *words: object) -> Result:
    return CliRunner().invoke(gpu.main, [str(out), *map(str, words)])


def records(out: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}


def write_model(path: Path, checkpoint_sha256: str = "") -> Path:
    """A tiny fp16 artifact whose metadata names a network that PyTorch can build."""
    model = tiny_model(precision="fp16", checkpoint_sha256=checkpoint_sha256)
    about = replace(parse_artifact(model, path), architecture="FPN", encoder="resnet18", options=OPTIONS)
    write_metadata(model, about)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every step the same share of the time, for busy machines; other tests check the limits."""
    monkeypatch.setattr(gpu, "STEPS", tuple(replace(step, minutes=20) for step in gpu.STEPS))


@pytest.mark.usefixtures("patient")
def test_every_step_runs_to_its_end_and_is_recorded(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(out, "--stand-in", "--model", model, "--minutes", 60)
    found = records(out)
    assert result.exit_code == 0, {name: (one["reason"], one["results"]) for name, one in found.items()}
    assert set(found) == set(NAMES)
    for name, record in found.items():
        assert record["step"] == name and record["status"] in ("done", "not run")
        # No result claims that a GPU ran.
        assert record["stand_in"] is True and record["provider"] == "cpu"
        assert record["device"] == describe_machine().cpu
        assert record["command"].endswith("--minutes 60 --model model.onnx --stand-in")
        assert record["versions"]["cloudrt"] and record["machine"]["usable_cores"] >= 1 and "cuda" in record["driver"]
        assert record["model"]["sha256"] == sha256(model)
        assert record["seconds"] > 0 and (out / record["log"]).is_file()
        assert all({"result", "not_run"} & part.keys() for part in record["results"].values())
        assert str(tmp_path) not in json.dumps(record)
    assert {name for name, one in found.items() if one["status"] == "not run"} <= {"decode"}

    parts = {name: record["results"] for name, record in found.items()}
    assert any(state["name"] == "cpu" and state["works"] for state in parts["install"]["doctor"]["providers"])
    assert set(parts["install"]["placement, fp16"]["nodes"]) == {"CPUExecutionProvider"}
    for precision in ("fp16", "fp32"):
        assert parts["answers"][f"{precision}, two streams"]["dice"] >= 0.995
        assert parts["answers"][f"{precision}, CUDA graph"] == {"not_run": "no GPU"}
    assert "not_run" in parts["answers"]["tests marked cuda"]
    for name, values in parts["engine"].items():
        rates = values.get("images_per_s", {})
        assert set(rates) == (
            set() if "CUDA graph" in name or "channels last" in name else {"with_copies", "without_copies"}
        )
        assert all(rate > 0 for rate in rates.values())
    for values in parts["pipeline"].values():
        assert set(values["stages"]) == {"decode", "infer", "postprocess"}
        assert values["limiting_stage"] in values["stages"] and values["share_of_engine"] > 0
        assert values["images_per_s"] > 0
    assert set(parts["pipeline"]) == {"525x350", "2100x1400"}
    for values in parts["memory"].values():
        assert values["batch_sizes"] == [1, 8, 2]
        assert values["results"] == values["images"] == values["same_rows"] == 24 and values["failed"] == 0
    assert parts["pytorch"]["PyTorch eager"]["ratio"] > 0 and parts["pytorch"]["PyTorch eager"]["weights"] == "random"
    assert parts["tensorrt"]["cpu, the artifact"]["same_bytes"] and parts["tensorrt"]["cpu, the artifact"]["dice"] == 1
    trained = parts["training"]["the model's network, the rest of the time"]
    assert trained["images"] >= 4 and trained["images_per_s"] > 0 and (out / "training" / "best.pth").is_file()

    summary = (out / "summary.md").read_text()
    assert "Run on the CPU (--stand-in)" in summary and summary in result.output
    assert all(f"| {name} | {found[name]['status']} |" in summary for name in NAMES)
    assert run(out, "--stand-in", "--model", model).exit_code == 2  # it would replace these results


SCRIPTS = {
    "fails": (
        "import json, sys; json.dump({'half': {'result': 'kept'}}, open(sys.argv[1], 'w')); sys.exit('no such thing')"
    ),
    "hangs": (
        "import json, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "json.dump({'child': {'result': str(child.pid)}}, open(sys.argv[1], 'w'))\n"
        "time.sleep(600)"
    ),
    "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "works": "import json, sys; json.dump({'all': {'result': 'fine'}}, open(sys.argv[1], 'w'))",
}


def test_steps_that_fail_hang_or_crash_are_recorded_and_the_next_ones_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        gpu_process,
        "child_command",
        lambda step, task, results: [sys.executable, "-I", "-S", "-c", SCRIPTS[step.name], str(results)],
    )
    steps = [GpuStep(name, name, 0.07 if name == "hangs" else 10, "") for name in SCRIPTS]
    lines: list[str] = []
    task = GpuTask("model.onnx", str(tmp_path), str(tmp_path))
    made = gpu_process.run_steps(steps, task, 30, {"device": "none"}, lines.append)
    assert made == list({name: records(tmp_path)[name] for name in SCRIPTS}.values())
    said = {one["step"]: (one["status"], one["reason"]) for one in made}
    assert said == {
        "fails": ("failed", "no such thing"),
        "hangs": ("timed out", "stopped after 6.3 s; 1 parts are finished"),
        "crashes": ("failed", "crashed: SIGSEGV"),
        "works": ("done", ""),
    }
    results = {one["step"]: one["results"] for one in made}
    assert results["fails"] == {"half": {"result": "kept"}} and results["works"] == {"all": {"result": "fine"}}
    if sys.platform == "linux":  # what the step had started is stopped too
        state = Path("/proc") / results["hangs"]["child"]["result"] / "stat"
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"
    assert [line.partition(":")[0] for line in lines] == [f"{n}/4 {name}" for n, name in enumerate(SCRIPTS, 1)]


def test_without_time_the_rest_is_recorded_as_not_run(model: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "out", "--stand-in", "--model", model, "--minutes", 0.001)
    assert result.exit_code == 0, result.output
    found = records(tmp_path / "out")
    assert set(found) == set(NAMES)
    assert {(one["status"], one["reason"]) for one in found.values()} == {("not run", "no time left of 0.001 minutes")}
    assert "no time left" in (tmp_path / "out" / "summary.md").read_text()


@pytest.mark.parametrize("minutes", ["nan", "inf"])
def test_the_time_must_be_a_number(minutes: str, model: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "out", "--stand-in", "--model", model, "--minutes", minutes)
    assert result.exit_code == 2 and f"--minutes {minutes}" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(nvidia_driver() is not None, reason="there is a driver")
def test_without_a_gpu_the_stand_in_must_be_asked_for(model: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "out", "--model", model)
    assert result.exit_code == 2 and "--stand-in" in result.output
    assert not (tmp_path / "out").exists()


def test_a_part_that_fails_leaves_the_others(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("CUDA failure 719\nand more")

    def skip() -> dict[str, Any]:
        raise NotRun("no GPU")

    def parts() -> Iterator[Part]:
        yield "one", lambda: {"result": "1"}
        yield "two", fail
        yield "three", skip
        yield "four", lambda: {"result": "4", "error": "too different"}

    gpu_task.run_parts(parts(), tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    assert found == {
        "one": {"result": "1"},
        "two": {"error": "RuntimeError: CUDA failure 719"},
        "three": {"not_run": "no GPU"},
        "four": {"result": "4", "error": "too different"},
    }
    log = tmp_path / "log"
    judged = gpu_process.judge(found, 0, 60, log)
    assert judged == {"status": "failed", "reason": "two: RuntimeError: CUDA failure 719 (2 of 4 parts)"}
    assert gpu_process.judge({"a": {"not_run": "no GPU"}}, 0, 60, log) == {"status": "not run", "reason": "no GPU"}


@pytest.mark.parametrize(
    "setting",
    [one if one == "two streams" else pytest.param(one, marks=pytest.mark.slow) for one in gpu_steps.SETTINGS],
)
def test_settings_of_the_engine_run_as_on_a_gpu(
    setting: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that claims to be CUDA's: graphs, streams and buffers take the paths that they take on a GPU."""
    stand_in_for_a_gpu(monkeypatch)
    monkeypatch.setattr("cloudrt.engines.choice.problem", lambda name: None)
    monkeypatch.setattr(gpu_task, "load_libraries", lambda name: None)
    monkeypatch.setattr(gpu_task, "open_gpu", lambda number: HostDevice())
    monkeypatch.setattr(gpu_task, "SECONDS", 0.01)
    monkeypatch.setattr("cloudrt.engines.trial.SHORTEST_S", 0.01)
    asked: list[dict[str, str]] = []

    class Noted(OnTheCpu):
        def __init__(self, content: bytes, options: object, providers: Any, enable_fallback: int) -> None:
            super().__init__(content, options, providers, enable_fallback)
            asked.append(providers[0][1])

    monkeypatch.setattr("cloudrt.engines.session.onnxruntime.InferenceSession", Noted)
    options = gpu_steps.SETTINGS[setting]
    found = gpu_steps._rates(GpuTask(str(model), str(tmp_path), str(tmp_path)), 2, options)
    graph = bool(options.get("cuda_graph"))
    assert set(found["images_per_s"]) == {"with_copies", "without_copies"} | (
        set() if graph else {"copies_by_onnxruntime"}
    )
    assert {one["enable_cuda_graph"] for one in asked} == {str(int(graph))}
    assert {one["prefer_nhwc"] for one in asked} == {str(int("channels last" in setting))}


def test_all_memory_but_the_room_is_held_in_pieces(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`hold` allocates the free memory except `room` bytes, and halves the block size when an allocation fails."""

    class Gpu:
        free, largest = 1000 * 2**20, 300 * 2**20

        def free_memory(self) -> int:
            return self.free

        def allocate(self, size: int) -> object:
            if size > self.largest:
                raise RuntimeError("CUDA failure 2: out of memory")
            self.free -= size
            return object()

    device = Gpu()
    monkeypatch.setattr(gpu_pipeline, "load_libraries", lambda name: None)
    monkeypatch.setattr(gpu_pipeline, "open_gpu", lambda number: device)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    gpu_pipeline.hold(100 * 2**20)
    left = device.free - 100 * 2**20
    assert 0 <= left <= 2**24
    assert int(capsys.readouterr().out) == 900 * 2**20 - left


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_a_checkpoint_is_exported_for_tensorrt(checkpoint: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.onnx", sha256(checkpoint))
    words = ["--checkpoint", checkpoint, "--only", "tensorrt", "--only", "pytorch", "--minutes", 60]
    result = run(tmp_path / "out", "--stand-in", "--model", model, *words)
    found = {name: one["results"] for name, one in records(tmp_path / "out").items()}
    assert result.exit_code == 0, found
    assert found["tensorrt"]["cpu, fp16"]["same_bytes"] and found["tensorrt"]["cpu, fp16"]["gate"]["dice"] >= 0.995
    assert "TensorRT" in found["tensorrt"]["cpu, int8"]["not_run"]  # its layout is not one for CPUs
    assert found["pytorch"]["PyTorch eager"]["weights"] == "of the checkpoint"
