"""Ctrl-C at any time, also while modules are imported: one line and status 130."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from support.paths import setup_entry_points
from support.tiny import SMALL_GRIDS, tiny_artifact, write_jpeg

from cloudrt.system.terminal import reports_errors

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
LINE = "Interrupted: no output was left incomplete\n"
QUIET = os.environ | {"PYTHONWARNINGS": "ignore"}

AT_IMPORT = """
import os, signal, sys

entry, wanted = sys.argv.pop(1), sys.argv.pop(1)

def hook(event, arguments):
    if event == "import" and arguments[0] == wanted:
        os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
sys.addaudithook(hook)
import cloudrt.__main__
getattr(cloudrt.__main__, entry)()
"""
LATER = """
import signal, sys
import cloudrt.__main__

signal.signal(signal.SIGINT, signal.default_int_handler)
print("ready", flush=True)
cloudrt.__main__.main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    tiny_artifact(folder / "model.onnx", (64, 96), SMALL_GRIDS)
    for number in range(3):
        write_jpeg(folder / "in" / f"{number}.jpg", number)
    return folder


def test_every_command_starts_in_the_module_that_handles_signals() -> None:
    assert setup_entry_points() == {
        "cloudrt": "cloudrt.__main__:main",
        **{f"cloudrt-{name}": f"cloudrt.__main__:{name}" for name in ("train", "export", "infer", "bench")},
    }


@pytest.mark.parametrize(
    ("entry", "module", "words"),
    [
        ("main", "click", ["infer", "in"]),
        ("main", "cloudrt.cli.run_options", ["infer", "in"]),
        ("train", "cloudrt.cli.types", ["in"]),
        ("export", "cloudrt.cli.types", ["model.pth"]),
        ("bench", "cloudrt.cli.run_options", []),
        ("infer", "numpy", ["in", "-m", "model.onnx", "--provider", "cpu"]),
        ("infer", "onnxruntime", ["in", "-m", "model.onnx", "--provider", "cpu"]),
        pytest.param("bench", "onnxruntime", ["model.onnx", "--provider", "cpu"], marks=pytest.mark.slow),
        pytest.param("export", "torch", ["checkpoint"], marks=pytest.mark.slow),
        pytest.param("train", "torch", ["scenes"], marks=pytest.mark.slow),
        pytest.param("train", "torch._C", ["scenes"], marks=pytest.mark.slow),
    ],
)
def test_during_an_import(
    folder: Path, request: pytest.FixtureRequest, entry: str, module: str, words: list[str]
) -> None:
    words = [str(request.getfixturevalue(word)) if word in ("scenes", "checkpoint") else word for word in words]
    command = [sys.executable, "-c", AT_IMPORT, entry, module, *words]
    done = subprocess.run(command, cwd=folder, env=QUIET, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines(keepends=True)[-1:]) == (130, [LINE]), done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in folder.iterdir()} == {"in", "model.onnx"}


@pytest.mark.parametrize(
    "delay_s", [0.05, *(pytest.param(one, marks=pytest.mark.slow) for one in (0.1, 0.2, 0.4, 0.8, 1.6))]
)
def test_after_a_delay(tmp_path: Path, delay_s: float) -> None:
    command = [sys.executable, "-c", LATER, "synth", "out", "-n", "1000000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=QUIET, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        error = process.stderr.read()
    assert (process.returncode, error.splitlines(keepends=True)[-1:]) == (130, [LINE]), error
    assert "Traceback" not in error


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_library_that_raises_another_exception(number: signal.Signals, status: int) -> None:
    @click.command()
    @reports_errors
    def command() -> None:
        try:
            signal.raise_signal(number)
        except BaseException as error:
            raise ImportError("partially initialised module") from error

    handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, handler)  # a background job ignores SIGINT
    try:
        done = CliRunner().invoke(command, [])
        assert (done.exit_code, done.stderr) == (status, LINE)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
