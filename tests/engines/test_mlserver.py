"""`--remote` against MLServer, another server of the protocol, over HTTP and gRPC; skipped where it is not installed.

MLServer needs packages of other versions than cloudrt's, so it has an environment of its own. To run this test:

    python3 -m venv mlserver && mlserver/bin/pip install mlserver onnxruntime
    CLOUDRT_MLSERVER=mlserver/bin/mlserver pytest tests/engines/test_mlserver.py
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.tiny import SMALL_GRIDS, tiny_artifact, write_jpeg

from cloudrt.cli import main
from cloudrt.engines.remote_metadata import model_parameters
from cloudrt.masks.rule import Rule
from cloudrt.model.artifact import read_artifact
from cloudrt.system.files import sha256

MLSERVER = os.environ.get("CLOUDRT_MLSERVER") or shutil.which("mlserver")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MLSERVER is None, reason="MLServer is not installed")]

SIZE, IMAGES = (64, 96), 9
RUNTIME = """
import numpy, onnxruntime
from mlserver import MLModel, types

class Runtime(MLModel):
    async def load(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(self.settings.parameters.uri, options)
        return True

    async def metadata(self):
        found = await super().metadata()
        found.parameters = types.Parameters(**self.settings.parameters.extra)
        return found

    async def predict(self, payload):
        (image,) = payload.inputs
        batch = numpy.array(image.data.root, numpy.uint8).reshape(image.shape)
        names = [one.name for one in self.session.get_outputs()]
        outputs = [
            types.ResponseOutput(name=name, datatype="UINT8", shape=list(array.shape), data=array.ravel().tolist())
            for name, array in zip(names, self.session.run(names, {"image": batch}))
        ]
        return types.InferenceResponse(model_name=self.name, outputs=outputs)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, images, one of them broken, and the submission of a local run."""
    folder = tmp_path_factory.mktemp("remote")
    rules = (Rule(110, 40), Rule(120, 9), Rule(127, 0, presence=120))
    tiny_artifact(folder / "tiny.onnx", SIZE, SMALL_GRIDS, presence=True, rules=rules)
    for seed in range(IMAGES):
        write_jpeg(folder / "images" / f"{seed}.jpg", seed)
    (folder / "images" / "4.jpg").write_bytes(b"no image")
    infer(folder, "local.csv", "--model", str(folder / "tiny.onnx"), "--provider", "cpu", "--threads", "1")
    return folder


@pytest.fixture(scope="module")
def ports(folder: Path) -> Iterator[tuple[int, int]]:
    """The HTTP and gRPC ports of MLServer, which serves the model with the parameters of cloudrt and without them."""
    assert MLSERVER
    http, grpc = free_port(), free_port()
    settings = {"http_port": http, "grpc_port": grpc, "metrics_endpoint": None, "parallel_workers": 0}
    home = folder / "mlserver"
    artifact = read_artifact(folder / "tiny.onnx")
    for name, extra in (("tiny", model_parameters(artifact, sha256(folder / "tiny.onnx"))), ("plain", {})):
        (home / name).mkdir(parents=True)
        (home / name / "cloudrt_runtime.py").write_text(RUNTIME)
        described = {
            "name": name,
            "implementation": "cloudrt_runtime.Runtime",
            "inputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, *SIZE, 3]}],
            "outputs": [
                {"name": "probability", "datatype": "UINT8", "shape": [-1, *artifact.output_shape]},
                {"name": "presence", "datatype": "UINT8", "shape": [-1, 3]},
            ],
            "parameters": {"uri": str(folder / "tiny.onnx"), "extra": extra},
        }
        (home / name / "model-settings.json").write_text(json.dumps(described))
    (home / "settings.json").write_text(json.dumps({"host": "127.0.0.1", "debug": False, **settings}))
    with (folder / "mlserver.log").open("w") as log:
        process = subprocess.Popen([MLSERVER, "start", str(home)], stdout=log, stderr=log)
        try:
            for name in ("tiny", "plain"):
                until_ready(http, name, process, folder / "mlserver.log")
            yield http, grpc
        finally:
            process.terminate()
            process.wait(60)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def until_ready(port: int, model: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        connection = HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("GET", f"/v2/models/{model}/ready")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.2)


def infer(folder: Path, output: str, *words: str) -> str:
    line = ["infer", str(folder / "images"), "--output", str(folder / output), "--batch-size", "2", "-v", *words]
    done = CliRunner().invoke(main, line)
    assert done.exit_code == 1, done.output  # an image fails
    return done.output


@pytest.mark.parametrize(
    ("protocol", "described"),
    [("http", True), ("http", False), ("grpc", False)],
    ids=["http-metadata-of-the-server", "http-rules-of-an-artifact", "grpc-rules-of-an-artifact"],
)
def test_submissions_are_those_of_a_local_run(
    folder: Path, ports: tuple[int, int], protocol: str, described: bool
) -> None:
    model, rules = ("tiny", []) if described else ("plain", ["--rules", str(folder / "tiny.onnx")])
    url = f"{protocol}://127.0.0.1:{ports[protocol == 'grpc']}"
    name = f"{protocol}-{model}.csv"
    text = infer(folder, name, "--remote", url, "--model", model, *rules)
    assert "provider remote, batch 2" in text
    assert ("no binary tensors over HTTP" in text) == (protocol == "http")
    assert (folder / name).read_bytes() == (folder / "local.csv").read_bytes()


def test_a_model_without_metadata_is_refused(folder: Path, ports: tuple[int, int]) -> None:
    """Over gRPC, the protocol has no parameters of a model, and MLServer, unlike Triton, has no model configuration."""
    for url, model in (
        (f"http://127.0.0.1:{ports[0]}", "plain"),
        (f"grpc://127.0.0.1:{ports[1]}", "plain"),
        (f"grpc://127.0.0.1:{ports[1]}", "tiny"),
    ):
        line = ["infer", str(folder / "images"), "-o", str(folder / "no.csv"), "--remote", url, "--model", model]
        done = CliRunner().invoke(main, line)
        assert done.exit_code == 2 and "no metadata of cloudrt" in done.output and "--rules" in done.output
