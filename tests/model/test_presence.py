"""Presence, from network to artifact: the classification head, and the mean of the highest probabilities."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from cloudrt.export.ensemble import Ensemble
from cloudrt.export.export import Target, export
from cloudrt.export.source import ExportSource, SourceOptions
from numpy.typing import NDArray
from support.networks import OPTIONS, update_batchnorm
from support.tiny import SMALL_GRIDS

from cloudrt.data.scenes import draw_scene
from cloudrt.engines.choice import open_engine
from cloudrt.errors import DataError, ParityError
from cloudrt.inference.pipeline import Segmenter
from cloudrt.masks.rule import Rule
from cloudrt.model.checkpoint import Checkpoint
from cloudrt.model.network import InferenceGraph, build_network
from cloudrt.model.network_config import NetworkConfig
from cloudrt.model.parity import Tolerances


def make(path: Path, presence: str, rules: tuple[Rule, ...] = (), seed: int = 0, top_k: int = 500) -> Checkpoint:
    """Write and return a checkpoint with random weights and updated statistics of BatchNorm."""
    torch.manual_seed(seed)
    config = NetworkConfig("FPN", "resnet18", OPTIONS, (64, 96), labels=SMALL_GRIDS, presence=presence, top_k=top_k)
    network = build_network(config)
    update_batchnorm(network)
    checkpoint = Checkpoint(config, network.state_dict(), rules, 0.5, 1)
    checkpoint.save(path)
    return checkpoint


@pytest.fixture(scope="module")
def batch() -> NDArray[np.uint8]:
    return np.stack([draw_scene(seed, (64, 96)).image for seed in range(5)])


def by_hand(checkpoint: Checkpoint, batch: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The levels of the graph, and the presence that NumPy computes from the outputs of the network."""
    config = checkpoint.config
    network = checkpoint.network()
    pixels = (batch.astype(np.float32) - np.array(config.mean, np.float32)) / np.array(config.std, np.float32)
    with torch.inference_mode():
        found = network(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
        graph = InferenceGraph(network, config).eval()
        levels = graph(torch.from_numpy(batch))[0].numpy()
        probability = graph.predict_probability(torch.from_numpy(batch).float().permute(0, 3, 1, 2))[0].numpy()
    if config.presence == "head":
        presence = 1 / (1 + np.exp(-found[1].numpy().astype(np.float64)))
    else:
        highest = np.sort(probability.reshape(*probability.shape[:2], -1), axis=2)[:, :, -config.top_k :]
        presence = highest.astype(np.float64).mean(axis=2)
    return levels, np.round(255 * presence).astype(np.uint8)


@pytest.mark.parametrize("presence", ["head", "top-k"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", pytest.param("int8", marks=pytest.mark.slow)])
def test_the_artifact_returns_the_networks_presence(
    tmp_path: Path, batch: NDArray[np.uint8], presence: str, precision: str
) -> None:
    checkpoint = make(tmp_path / "best.pth", presence)
    levels, wanted = by_hand(checkpoint, batch)
    assert wanted.std() > 0
    wide = Tolerances(64, 0.0, 1.0) if precision == "int8" else None  # no search for layers to keep in fp32
    source = ExportSource(tmp_path / "best.pth", SourceOptions(calibrate=precision == "int8", max_images=16))
    done = export(source, tmp_path / "model.onnx", Target(precision, tolerances=wide))
    assert done.parity.presence_difference is not None
    largest = {"fp32": 1, "fp16": 3, "int8": 40}[precision]
    for provider in ("cpu", *(["openvino"] if find_spec("openvino") else [])):
        with open_engine(done.path, provider, 5) as engine:
            found, said = engine.run(batch)
        assert said is not None
        assert np.abs(said.astype(int) - wanted).max() <= largest
        assert np.abs(found.astype(int) - levels).mean() <= largest


def test_rules_use_the_presence(tmp_path: Path, batch: NDArray[np.uint8]) -> None:
    """A class is empty where its presence is below the rule's, whatever its mask."""
    _, presence = by_hand(make(tmp_path / "best.pth", "head"), batch)
    cut = int(np.sort(presence[:, 0])[2])
    rules = (Rule(0, 0, presence=cut), Rule(0, 0), Rule(0, 0))
    make(tmp_path / "best.pth", "head", rules)
    export(ExportSource(tmp_path / "best.pth"), tmp_path / "model.onnx", Target("fp32"))
    with Segmenter(tmp_path / "model.onnx", provider="cpu", batch_size=2) as segmenter:
        for result, said in zip(segmenter.predict(list(batch)), presence, strict=True):
            assert bool(result.rle["Fish"]) == (said[0] >= cut)
            assert result.rle["Flower"]


@pytest.mark.parametrize("presence", ["head", "top-k"])
def test_an_ensemble_over_flips_is_the_mean_of_its_members(
    tmp_path: Path, batch: NDArray[np.uint8], presence: str
) -> None:
    members = [make(tmp_path / f"{seed}.pth", presence, seed=seed) for seed in range(2)]
    with torch.inference_mode():
        found, said = Ensemble(tuple(members), ("a", "b"), "h").graph()(torch.from_numpy(batch))
    answers = []  # of each member, from the mean logits of its views
    for member in members:
        graph = InferenceGraph(member.network(), member.config).eval()
        maps, heads = [], []
        for flipped in (False, True):
            view = batch[:, :, ::-1].copy() if flipped else batch
            with torch.inference_mode():
                probability, head = graph.predict_probability(torch.from_numpy(view).float().permute(0, 3, 1, 2))
            maps.append(torch.logit(probability.flip(2) if flipped else probability))
            heads += [] if head is None else [torch.logit(head)]
        answers.append((torch.sigmoid(torch.stack(maps).mean(0)), heads and torch.sigmoid(torch.stack(heads).mean(0))))
    mean = torch.stack([one for one, _ in answers]).mean(0).numpy()
    wanted = np.round(255 * mean)
    assert np.abs(found.numpy().astype(int) - wanted).max() <= 1
    if presence == "head":
        certain = torch.stack([head for _, head in answers if isinstance(head, torch.Tensor)]).mean(0).numpy()
    else:
        certain = np.sort(mean.reshape(*mean.shape[:2], -1), axis=2)[:, :, -500:].mean(axis=2)
    assert np.abs(said.numpy().astype(int) - np.round(255 * certain)).max() <= 1


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    head, none, few = make(tmp_path / "h", "head"), make(tmp_path / "n", "none"), make(tmp_path / "t", "top-k", top_k=9)
    many = make(tmp_path / "m", "top-k")
    for pair in ((head, none), (few, many)):
        with pytest.raises(DataError, match="same presence"):
            Ensemble(pair, ("a", "b"))
    with pytest.raises(DataError, match="presence must be one of none, head, top-k"):
        NetworkConfig(presence="tail")
    with pytest.raises(DataError, match="top_k must be from 1"):
        NetworkConfig(presence="top-k", top_k=0)


def test_the_parity_gate_finds_a_wrong_head(tmp_path: Path) -> None:
    """Other weights in the head give the same masks; only presence differs."""
    make(tmp_path / "best.pth", "head")
    source = ExportSource(tmp_path / "best.pth")
    (weight,) = [one for one in source.model.graph.initializer if "classification_head" in one.name]
    weight.raw_data = (-np.frombuffer(weight.raw_data, np.float32)).tobytes()
    with pytest.raises(ParityError, match="mean difference of presence"):
        export(source, tmp_path / "model.onnx", Target("fp32"))
