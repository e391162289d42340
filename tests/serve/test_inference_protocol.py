"""The Open Inference Protocol: Triton's own client works unchanged, and gets the outputs of the local engine."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.server import Server, serving
from support.tiny import SMALL_GRIDS, tiny_artifact

from cloudrt.engines.choice import open_engine
from cloudrt.inference.pipeline import Segmenter
from cloudrt.model.artifact import Artifact, read_artifact
from cloudrt.serve.inference_protocol import MAX_BATCH
from cloudrt.system.files import sha256

SHAPE = (64, 96, 3)
INFER = "/v2/models/tiny/infer"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("model") / "tiny.onnx", SHAPE[:2], SMALL_GRIDS, presence=True)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with Segmenter(model, provider="cpu", batch_size=4) as segmenter, serving(segmenter) as running:
        yield running


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return np.random.default_rng(5).integers(0, 256, (6, *SHAPE), np.uint8)


@pytest.fixture(scope="module")
def expected(model: Path, images: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    with open_engine(model, "cpu", None) as engine:
        probability, presence = engine.run(images)
    assert presence is not None
    return probability, presence


def client_module() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("tritonclient.http")


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    client = client_module().InferenceServerClient(f"127.0.0.1:{server.port}")
    yield client
    client.close()


def test_health_and_metadata(client: Any, model: Path) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("tiny") and client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("other") and not client.is_model_ready("tiny", "2")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("tiny")
    assert metadata["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, *SHAPE]}]
    assert [(one["name"], one["shape"]) for one in metadata["outputs"]] == [
        ("probability", [-1, 3, 90, 60]),
        ("presence", [-1, 3]),
    ]
    parameters = client.get_model_config("tiny")["parameters"]
    described = Artifact.from_dict(json.loads(parameters["cloudrt.artifact"]["string_value"]))
    assert described == read_artifact(model)
    assert parameters["cloudrt.sha256"]["string_value"] == sha256(model)


@pytest.mark.parametrize("sent", [True, False], ids=["binary-input", "json-input"])
@pytest.mark.parametrize("received", [True, False], ids=["binary-output", "json-output"])
def test_outputs_are_those_of_the_engine(
    client: Any, images: NDArray[np.uint8], expected: tuple[Any, Any], sent: bool, received: bool
) -> None:
    triton = client_module()
    tensor = triton.InferInput("image", images.shape, "UINT8")
    tensor.set_data_from_numpy(images, binary_data=sent)
    outputs = [triton.InferRequestedOutput(name, binary_data=received) for name in ("probability", "presence")]
    answer = client.infer("tiny", [tensor], outputs=outputs, request_id="7")
    np.testing.assert_array_equal(answer.as_numpy("probability"), expected[0])
    np.testing.assert_array_equal(answer.as_numpy("presence"), expected[1])
    assert answer.get_response()["id"] == "7"


def test_default_and_single_outputs(client: Any, images: NDArray[np.uint8], expected: tuple[Any, Any]) -> None:
    triton = client_module()
    tensor = triton.InferInput("image", images[:1].shape, "UINT8")
    tensor.set_data_from_numpy(images[:1])
    answer = client.infer("tiny", [tensor])
    np.testing.assert_array_equal(answer.as_numpy("probability"), expected[0][:1])
    only = client.infer("tiny", [tensor], outputs=[triton.InferRequestedOutput("presence")], model_version="1")
    np.testing.assert_array_equal(only.as_numpy("presence"), expected[1][:1])
    assert only.as_numpy("probability") is None


def request(**changes: Any) -> dict[str, Any]:
    return {"name": "image", "datatype": "UINT8", "shape": [1, *SHAPE], "data": [0] * (64 * 96 * 3)} | changes


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "one input"),
        ({"inputs": [request(), request()]}, "one input"),
        ({"inputs": [request(name="picture")]}, "'image' of the datatype UINT8"),
        ({"inputs": [request(datatype="FP32")]}, "'image' of the datatype UINT8"),
        ({"inputs": [request(shape=[1, 64, 96])]}, r"[n, 64, 96, 3]"),
        ({"inputs": [request(shape=["1", *SHAPE])]}, r"[n, 64, 96, 3]"),
        ({"inputs": [request(shape=[1, 64.0, 96, 3])]}, r"[n, 64, 96, 3]"),
        ({"inputs": [request(shape=[1, 64, 96, 3.0], parameters={"binary_data_size": 5})]}, r"[n, 64, 96, 3]"),
        ({"inputs": [request(shape=[0, *SHAPE])]}, "1 to"),
        ({"inputs": [request(shape=[MAX_BATCH + 1, *SHAPE])]}, "1 to"),
        ({"inputs": [request(data=[1, 2])]}, "integers, found 2 values of type int"),
        ({"inputs": [request(data=[[1], [1, 2]])]}, "integers, found 2 values of type list"),
        ({"inputs": [request(data=[True] * (64 * 96 * 3))]}, "values of type bool"),
        ({"inputs": [request(data=["9" * 1_000_000, *"1" * 100_000])]}, "integers, found 100001 values of type str"),
        ({"inputs": [request(data=[256] * (64 * 96 * 3))]}, "from 0 to 255"),
        ({"inputs": [request(data=[0.5] * (64 * 96 * 3))]}, "integers"),
        ({"inputs": [request(data=None)]}, "integers"),
        ({"inputs": [request(parameters={"binary_data_size": 5})]}, "stated 5"),
        ({"inputs": [request(parameters=[1])]}, "parameters must be an object"),
        ({"inputs": [request()], "outputs": [{"name": "mask"}]}, "no output 'mask'"),
        ({"inputs": [request()], "outputs": "all"}, "list of objects"),
        (
            {"inputs": [request()], "outputs": [{"name": "presence", "parameters": {"classification": 2}}]},
            "classification",
        ),
    ],
)
def test_malformed_requests_are_refused(server: Server, body: Any, words: str) -> None:
    answer = server.ask(INFER, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert answer.status == 400
    assert words in answer.json["error"]


def test_wrong_headers_and_models_are_refused(server: Server) -> None:
    for length in ("x", "-1", "10", "²", "1" * 5_000):
        answer = server.ask(INFER, b"{}", {"Inference-Header-Content-Length": length})
        assert answer.status == 400
        assert answer.json["error"].startswith("Inference-Header-Content-Length must be a number")
    assert server.ask(INFER, b"{}", {"Content-Encoding": "gzip"}).json["error"].startswith("compressed")
    assert server.ask("/v2/models/other/infer", b"{}").status == 404
    assert server.ask("/v2/models/other").json["error"].startswith("no model 'other'")
    for path in ("/v2/other", "/v2/models/tiny/other"):
        answer = server.ask(path)
        assert (answer.status, answer.json) == (404, {"error": "Not Found"})
    assert server.ask(INFER).json == {"error": "Method Not Allowed"}
