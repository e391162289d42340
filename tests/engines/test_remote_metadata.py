"""Metadata of remote models: what is accepted, and what is refused when the engine connects."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.metadata_server import SIZE, change_artifact, metadata_server
from support.tiny import SMALL_GRIDS, tiny_artifact

from cloudrt.engines.remote import RemoteEngine, connect
from cloudrt.errors import ArtifactError, DataError, ProviderError
from cloudrt.masks.rule import Rule
from cloudrt.model.artifact import read_artifact
from cloudrt.options import RemoteOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rules need its presence."""
    folder = tmp_path_factory.mktemp("remote")
    tiny_artifact(folder / "tiny.onnx", SIZE, SMALL_GRIDS, presence=True, rules=(Rule(127, 0, presence=120),) * 3)
    return folder


def test_metadata_of_a_silent_grpc_server_have_a_time_limit() -> None:
    pytest.importorskip("grpc")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = RemoteOptions((f"grpc://127.0.0.1:{silent.getsockname()[1]}",), "tiny", timeout_s=0.2)
        with pytest.raises(ProviderError, match="Deadline Exceeded"):
            connect(options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["inputs"][0].update(datatype="FP32"), "'image' is FP32"),
        (lambda m: m["inputs"][0].update(shape=[-1, 3, 64, 96]), r"expected UINT8 \[-1, 64, 96, 3\]"),
        (lambda m: m["inputs"][0].update(name="picture"), "'picture' is UINT8"),
        (lambda m: m["outputs"][0].update(shape=[-1, 3, 60, 90]), r"'probability' is UINT8 \[-1, 3, 60, 90\]"),
        (lambda m: m["outputs"].clear(), "must have the input 'image' and the output 'probability'"),
        (lambda m: m.pop("parameters"), "no metadata of cloudrt"),
        (lambda m: m["parameters"].update({"cloudrt.artifact": "[]"}), "malformed metadata"),
        (lambda m: m["outputs"].pop(), "no output 'presence', which the rules need"),
        (lambda m: m.update(parameters=[1]), "malformed metadata"),
        (lambda m: m.update(outputs=None), "malformed metadata"),
        (lambda m: m.update(outputs=["probability"]), "malformed metadata"),
        (lambda m: m["inputs"][0].update(shape="abcd"), "malformed metadata"),
        (lambda m: m["inputs"][0].update(shape=[-1, 1e999, 96, 3]), "malformed metadata"),
        (lambda m: m["inputs"][0].update(name=["image"]), "malformed metadata"),
        (lambda m: m["parameters"].update({"cloudrt.artifact": "[" * 100_000}), "malformed metadata"),
        (lambda m: change_artifact(m, input_size=[64.0, 96]), "malformed metadata: input_size must be"),
        (lambda m: change_artifact(m, input_size="ab"), "malformed metadata: input_size must be"),
        (lambda m: change_artifact(m, input_size=5), "malformed metadata"),
        (lambda m: change_artifact(m, input_size=[1 << 20, 1 << 20]), "is larger than 1,073,741,824 bytes"),
        (lambda m: change_artifact(m, submit_grid=[1 << 20, 1 << 20], label_grid=[1 << 20, 1 << 20]), "is larger"),
    ],
)
def test_other_tensors_and_metadata_are_refused_at_the_start(
    folder: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    with metadata_server(change, folder) as url, pytest.raises(ArtifactError, match=words):
        connect(RemoteOptions((url,), "tiny"))


def test_rules_of_a_local_artifact(folder: Path) -> None:
    with metadata_server(lambda m: m.pop("parameters"), folder) as url:
        found = connect(RemoteOptions((url,), "tiny", rules=str(folder / "tiny.onnx")))
    assert found.artifact == read_artifact(folder / "tiny.onnx")
    assert found.outputs == ("probability", "presence")


def test_servers_with_different_models_are_refused(folder: Path) -> None:
    def other(metadata: dict[str, Any]) -> None:
        metadata["parameters"]["cloudrt.sha256"] = "1"

    with metadata_server(lambda _: None, folder) as one, metadata_server(other, folder) as two:
        rules = str(folder / "tiny.onnx")
        with pytest.raises(ArtifactError, match="different models named 'tiny'"):
            connect(RemoteOptions((one, two), "tiny", rules=rules))
        alone = [connect(RemoteOptions((url,), "tiny", rules=rules)) for url in (one, two)]
        assert alone[0].digest != alone[1].digest  # a resumed run finds that the model was replaced
        with pytest.raises(ArtifactError, match="different models named 'tiny'"):
            connect(RemoteOptions((one, two), "tiny"))
        engine = RemoteEngine(connect(RemoteOptions((one, one), "tiny")), 32)
        with engine, pytest.raises(DataError, match="uint8 images of shape"):
            engine.run(np.zeros((1, 2, 2, 3), np.uint8))
