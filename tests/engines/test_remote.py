"""Servers of the Open Inference Protocol as an engine, over HTTP and gRPC: the bytes are those of a local run."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from support.metadata_server import SIZE, metadata_server
from support.server import serving
from support.tiny import SMALL_GRIDS, tiny_artifact, write_jpeg

from cloudrt.cli import main
from cloudrt.engines import remote
from cloudrt.engines.choice import open_engine
from cloudrt.engines.remote import RemoteEngine, connect
from cloudrt.engines.remote_client import ServerError
from cloudrt.engines.remote_metadata import model_parameters
from cloudrt.errors import ProviderError
from cloudrt.inference.journal import Journal
from cloudrt.inference.journal_records import Record
from cloudrt.inference.pipeline import Segmenter
from cloudrt.masks.rule import Rule
from cloudrt.model.artifact import read_artifact
from cloudrt.options import RemoteOptions, RunOptions
from cloudrt.serve import inference_protocol
from cloudrt.serve.batcher import Batcher
from cloudrt.system.files import sha256

IMAGES = 31


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, images, one of them broken, and the submission of a local run."""
    folder = tmp_path_factory.mktemp("remote")
    rules = (Rule(110, 40), Rule(120, 9), Rule(127, 0, presence=120))
    model = tiny_artifact(folder / "tiny.onnx", SIZE, SMALL_GRIDS, presence=True, rules=rules)
    for seed in range(IMAGES):
        write_jpeg(folder / "images" / f"{seed:02}.jpg", seed)
    (folder / "images" / "04.jpg").write_bytes(b"no image")
    done = infer(folder, "local.csv", "--model", str(model), "--provider", "cpu")
    assert done.exit_code == 1, done.output
    return folder


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(remote, "LONGEST_PAUSE_S", 0.1)


def infer(folder: Path, output: str, *words: str) -> Any:
    line = ["infer", str(folder / "images"), "--output", str(folder / output), "--batch-size", "2", *words]
    return CliRunner().invoke(main, line)


def same(folder: Path, output: str) -> bool:
    """Whether rows and failures are those of the local run."""
    pairs = ((f"{output}.csv", "local.csv"), (f"{output}.failures.csv", "local.failures.csv"))
    return all((folder / one).read_bytes() == (folder / other).read_bytes() for one, other in pairs)


def opened(folder: Path) -> Segmenter:
    return Segmenter(folder / "tiny.onnx", provider="cpu", batch_size=4)


@contextmanager
def grpc_server(folder: Path) -> Iterator[str]:
    """A gRPC server from the protocol's own stubs, with one model."""
    grpc = pytest.importorskip("grpc")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tritonclient.grpc import service_pb2 as messages
        from tritonclient.grpc import service_pb2_grpc as stubs
    artifact = read_artifact(folder / "tiny.onnx")
    engine = open_engine(folder / "tiny.onnx", "cpu", None, 1)

    class Servicer(stubs.GRPCInferenceServiceServicer):  # type: ignore[misc]
        def ModelMetadata(self, request: Any, context: Any) -> Any:
            tensor = messages.ModelMetadataResponse.TensorMetadata
            return messages.ModelMetadataResponse(
                name=request.name,
                inputs=[tensor(name="image", datatype="UINT8", shape=[-1, *SIZE, 3])],
                outputs=[
                    tensor(name="probability", datatype="UINT8", shape=[-1, *artifact.output_shape]),
                    tensor(name="presence", datatype="UINT8", shape=[-1, 3]),
                ],
            )

        def ModelConfig(self, request: Any, context: Any) -> Any:
            response = messages.ModelConfigResponse()
            response.config.max_batch_size = 8
            for key, value in model_parameters(artifact, sha256(folder / "tiny.onnx")).items():
                response.config.parameters[key].string_value = value
            return response

        def ModelInfer(self, request: Any, context: Any) -> Any:
            (image,) = request.inputs
            batch = np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(image.shape)
            response = messages.ModelInferResponse(model_name=request.model_name)
            for name, array in zip(("probability", "presence"), engine.run(batch), strict=True):
                assert array is not None
                response.outputs.add(name=name, datatype="UINT8", shape=array.shape)
                response.raw_output_contents.append(array.tobytes())
            return response

    server = grpc.server(ThreadPoolExecutor(4))
    stubs.add_GRPCInferenceServiceServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
        engine.close()


def test_http(folder: Path) -> None:
    with opened(folder) as segmenter, serving(segmenter) as server:
        done = infer(folder, "http.csv", "--remote", server.url, "--model", "tiny")
        assert done.exit_code == 1, done.output
        assert "provider remote, batch 2" in done.output
        assert same(folder, "http")
        assert server.metric("cloudrt_batch_images_sum") > 0


def test_a_server_without_binary_tensors_gets_json(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_protocol, "EXTENSIONS", ["model_configuration"])
    parse, lengths = inference_protocol._Tensors.parse, []

    def recorded(self: Any, body: bytes, header_length: str | None) -> Any:
        lengths.append(header_length)
        return parse(self, body, header_length)

    monkeypatch.setattr(inference_protocol._Tensors, "parse", recorded)
    with opened(folder) as segmenter, serving(segmenter) as server:
        done = infer(folder, "json.csv", "--remote", server.url, "--model", "tiny")
    assert "no binary tensors over HTTP" in done.output
    assert same(folder, "json") and len(lengths) >= IMAGES // 2 and set(lengths) == {None}


def test_grpc(folder: Path) -> None:
    with grpc_server(folder) as url:
        assert infer(folder, "grpc.csv", "--remote", url, "--model", "tiny").exit_code == 1
    assert same(folder, "grpc")


def test_several_servers_share_the_work_and_one_may_die(folder: Path) -> None:
    with opened(folder) as first, opened(folder) as second, serving(first) as left, serving(second) as right:
        options = RemoteOptions((left.url, right.url), "tiny")
        with Segmenter(options=RunOptions(remote=options, batch_size=2)) as segmenter:
            paths = sorted((folder / "images").iterdir())
            before = [one.rle for one in segmenter.predict(paths)]
            assert min(left.metric("cloudrt_batch_images_sum"), right.metric("cloudrt_batch_images_sum")) > 0
            right.stop()
            assert [one.rle for one in segmenter.predict(paths)] == before


def test_a_server_that_dies_in_mid_run_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers 13 requests; the run stops, and continues once the server is back, with the same bytes."""
    answer, asked = Batcher.infer, 0

    async def dies(self: Batcher, image: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked > 26:
            raise ProviderError("the device is lost")
        return await answer(self, image)

    with opened(folder) as segmenter, serving(segmenter) as server:
        with monkeypatch.context() as patch:
            patch.setattr(Batcher, "infer", dies)
            done = infer(folder, "dies.csv", "--remote", server.url, "--model", "tiny")
        assert done.exit_code == 2
        assert "the batch failed after 8 attempts" in done.output and "device is lost" in done.output
        assert (folder / "dies.csv.journal").exists() and not (folder / "dies.csv").exists()
        resumed = infer(folder, "dies.csv", "--remote", server.url, "--model", "tiny", "--resume")
        assert resumed.exit_code == 1 and "images are finished, continuing" in resumed.output, resumed.output
        assert same(folder, "dies")


def test_a_batch_is_sent_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, lock, calls = Batcher.infer, threading.Lock(), 0

    async def fails(self: Batcher, image: Any) -> Any:
        nonlocal calls
        with lock:
            calls += 1
            if calls % 3 == 1:
                raise ProviderError("busy")
        return await answer(self, image)

    with opened(folder) as segmenter, serving(segmenter) as server:
        options = RunOptions(remote=RemoteOptions((server.url,), "tiny", streams=1), batch_size=1)
        with Segmenter(options=options) as remote_segmenter, opened(folder) as local:
            monkeypatch.setattr(Batcher, "infer", fails)
            paths = sorted((folder / "images").iterdir())
            pairs = zip(remote_segmenter.predict(paths), local.predict(paths), strict=True)
            assert all((one.rle, one.error) == (other.rle, other.error) for one, other in pairs)
        assert calls > len(paths)


def test_pauses_do_not_overflow_after_many_failures(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A pause that doubled with each of 1200 failures would be larger than any float."""
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.0)
    with metadata_server(lambda _: None, folder) as url:
        model = connect(RemoteOptions((url,), "tiny", attempts=600))
    with RemoteEngine(model, 1) as engine:
        for _ in range(2):
            with pytest.raises(ProviderError, match="after 600 attempts"):
                engine.run(np.zeros((1, *SIZE, 3), np.uint8))


def test_streams_that_fail_together_count_once(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 60.0)
    together = threading.Barrier(4)

    class Lost:
        def infer(self, *_: Any) -> Any:
            together.wait(60)
            raise ServerError("lost", again=True)

    with metadata_server(lambda _: None, folder) as url:
        engine = RemoteEngine(connect(RemoteOptions((url,), "tiny", attempts=1)), 1)
    monkeypatch.setattr(remote, "_open_client", lambda *_: Lost())
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(engine.run, np.zeros((1, *SIZE, 3), np.uint8)) for _ in range(4)]
        assert all(isinstance(one.exception(), ProviderError) for one in done)
    assert [server.failures for server in engine._servers] == [1]


def test_a_journal_of_a_remote_run_is_refused_on_this_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the reverse; the message names the provider."""
    add, added = Journal.add, 0

    def stop_in_the_middle(self: Journal, record: Record) -> None:
        nonlocal added
        added += 1
        if added % 9 == 0:
            raise OSError("no space")
        add(self, record)

    with opened(folder) as segmenter, serving(segmenter) as server:
        remotely = ["--remote", server.url, "--model", "tiny"]
        locally = ["--model", str(folder / "tiny.onnx"), "--provider", "cpu"]
        for first, then, words in (
            (remotely, locally[:2], "provider was remote, now"),
            (locally, remotely, "provider was cpu, now remote"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(Journal, "add", stop_in_the_middle)
                infer(folder, "moved.csv", *first)
            assert (folder / "moved.csv.journal").exists()
            resumed = infer(folder, "moved.csv", *then, "--resume")
            assert resumed.exit_code == 2 and words in resumed.output, resumed.output
            (folder / "moved.csv.journal").unlink()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--remote", "http://127.0.0.1:9", "--model", "tiny"], "model 'tiny' of http://127.0.0.1:9"),
        (["--remote", "http://127.0.0.1:9"], "--remote needs --model NAME"),
        (["--remote", "ftp://127.0.0.1:9", "--model", "tiny"], "expected http://HOST:PORT"),
        (["--remote", "http://x", "--model", "tiny", "--provider", "cpu"], "--remote does not work with --provider"),
        (["--remote", "http://x", "--model", "tiny", "--cluster", "local"], "--remote does not work with --cluster"),
        (["--rules", "tiny.onnx"], "--rules needs --remote"),
    ],
)
def test_wrong_options_are_one_line(folder: Path, words: list[str], text: str) -> None:
    done = infer(folder, "none.csv", *words)
    assert (done.exit_code, done.output.count("\n")) == (2, 1), done.output
    assert text in done.output


def test_a_token_is_sent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cloudrt.serve.settings import ServeSettings

    with opened(folder) as segmenter, serving(segmenter, ServeSettings(token="secret")) as server:
        options = RemoteOptions((server.url,), "tiny")
        with pytest.raises(ProviderError, match="a bearer token is required"):
            connect(options)
        monkeypatch.setenv("CLOUDRT_TOKEN", "secret")
        with RemoteEngine(connect(options), 2) as engine:
            assert engine.run(np.zeros((2, *SIZE, 3), np.uint8))[0].shape == (2, 3, 90, 60)
