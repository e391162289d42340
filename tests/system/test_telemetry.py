"""Usage data: inference writes and sends none, importing libraries asks no server; variables the user has set stay."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny import SMALL_GRIDS, tiny_artifact, write_jpeg

from cloudrt.system.telemetry import SWITCHES

SESSION = """
import onnxruntime, sys
onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
"""
WAIT = """
import os, time
time.sleep(1)
found = []
for number in os.listdir("/proc/self/fd"):
    try:
        found.append(os.readlink(f"/proc/self/fd/{number}"))
    except OSError:
        continue
print(sum(link.startswith("socket:") for link in found))
"""
TRIES = """
import time
for _ in range(int(sys.argv[-1])):
    time.sleep(1)
    names, values = (line.split() for line in open("/proc/self/net/snmp").read().splitlines()[:2])
    tries = int(values[names.index("OutNoRoutes")])  # in a namespace without a network, every packet adds one
    if tries:
        break
print(tries)
"""
LOOKUPS = """
import sys
asked = []
sys.addaudithook(lambda event, _: asked.append(event) if event in ("socket.getaddrinfo", "socket.connect") else None)
for name in sys.argv[1:]:
    try:
        __import__(name)
    except ModuleNotFoundError:
        pass
print(len(asked))
"""


def run(code: str, home: Path, *words: str, isolated: bool = False) -> str:
    """Run Python with `home` as its home folder, without any of the switches; return the last line that it prints.

    CI is unset too: ONNX Runtime collects nothing where it is set.
    """
    home.mkdir(exist_ok=True)
    left_out = {*SWITCHES, "XDG_CACHE_HOME", "CI", "GITHUB_ACTIONS"}
    ours = {name: value for name, value in os.environ.items() if name not in left_out}
    command = [*(["unshare", "--net"] if isolated else []), sys.executable, "-c", code, *words]
    done = subprocess.run(command, env=ours | {"HOME": str(home)}, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def written(home: Path) -> list[str]:
    return [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file() and "cloudrt" not in path.parts]


without_network = pytest.mark.skipif(
    sys.platform != "linux"
    or shutil.which("unshare") is None
    or subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode != 0,
    reason="needs a network namespace, so that nothing leaves the machine",
)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_inference_writes_no_usage_data_and_leaves_no_socket_open(tmp_path: Path, provider: str) -> None:
    if provider == "openvino":
        pytest.importorskip("openvino")
    model = tiny_artifact(tmp_path / "model.onnx", labels=SMALL_GRIDS)
    image = write_jpeg(tmp_path / "a.jpg", 0).path
    code = (
        "import cloudrt, sys\nlist(cloudrt.Segmenter(sys.argv[1], provider=sys.argv[3]).predict([sys.argv[2]]))" + WAIT
    )
    assert run(code, tmp_path / "home", str(model), str(image), provider) == "0"
    assert written(tmp_path / "home") == []


SECONDS = "10"
"""Longest wait for ONNX Runtime to try to send its events, in seconds; it tries after about one."""


@without_network
def test_inference_sends_nothing(tmp_path: Path) -> None:
    model = tiny_artifact(tmp_path / "model.onnx", labels=SMALL_GRIDS)
    image = write_jpeg(tmp_path / "a.jpg", 0).path
    code = "import cloudrt, sys\nlist(cloudrt.Segmenter(sys.argv[1], provider='cpu').predict([sys.argv[2]]))" + TRIES
    assert run(code, tmp_path / "home", str(model), str(image), SECONDS, isolated=True) == "0"


@without_network
def test_onnxruntime_alone_tries_to_send(tmp_path: Path) -> None:
    """Positive control of the test above."""
    model = tiny_artifact(tmp_path / "model.onnx", labels=SMALL_GRIDS)
    assert int(run(SESSION + TRIES, tmp_path / "home", str(model), SECONDS, isolated=True)) > 0


LIBRARIES = ("torch", "segmentation_models_pytorch", "albumentations", "huggingface_hub", "openvino", "ray")


@without_network
def test_importing_the_libraries_asks_no_server(tmp_path: Path) -> None:
    """Positive control: albumentations alone asks PyPI for a newer version."""
    assert run(LOOKUPS, tmp_path / "home", "cloudrt", *LIBRARIES, isolated=True) == "0"
    assert int(run(LOOKUPS, tmp_path / "home", "albumentations", isolated=True)) > 0


def test_ray_and_the_hub_read_the_variables(tmp_path: Path) -> None:
    pytest.importorskip("ray._common.usage.usage_lib", reason="Ray has moved its usage report")
    pytest.importorskip("huggingface_hub")
    code = (
        "from huggingface_hub.constants import HF_HUB_DISABLE_TELEMETRY as off\n"
        "from ray._common.usage.usage_lib import usage_stats_enabled as on\n"
        "print(off, on())"
    )
    assert run("import cloudrt\n" + code, tmp_path / "home") == "True False"
    assert run(code, tmp_path / "home") == "False True"


@without_network
def test_onnxruntime_alone_writes_its_events(tmp_path: Path) -> None:
    """Positive control of the first test, in a namespace without a network."""
    model = tiny_artifact(tmp_path / "model.onnx", labels=SMALL_GRIDS)
    run(SESSION + WAIT, tmp_path / "home", str(model), isolated=True)
    assert any("onnxruntime" in name for name in written(tmp_path / "home"))


@without_network
def test_openvino_alone_writes_the_id_of_the_user(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    code = "import importlib.util, openvino; print(importlib.util.find_spec('openvino_telemetry') is not None)"
    if run(code, tmp_path / "home", isolated=True) == "False":
        pytest.skip("openvino_telemetry is not installed")
    assert any("openvino" in name for name in written(tmp_path / "home"))


def test_what_the_user_has_set_stays() -> None:
    code = "import os, sys; import cloudrt; print(*(os.environ[name] for name in sys.argv[1:]))"
    ours = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    command = [sys.executable, "-c", code, *SWITCHES]
    for given in ({}, {"ORT_DISABLE_TELEMETRY": "0", "RAY_USAGE_STATS_ENABLED": "1"}):
        done = subprocess.run(command, env=ours | given, capture_output=True, text=True, check=True)
        assert done.stdout.split() == list((SWITCHES | given).values())
