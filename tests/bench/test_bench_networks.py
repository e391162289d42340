"""The networks and the notebook's post-processing that the benchmark compares: their results equal ours."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from cloudrt.bench import agreement, networks, notebook
from cloudrt.bench.measure import bench as run_bench
from cloudrt.bench.options import BenchOptions
from cloudrt.bench.workload import infer
from cloudrt.export.ensemble import Ensemble
from cloudrt.export.graph import describe, trace
from support.networks import make_checkpoint
from support.tiny import tiny_artifact

from cloudrt.errors import ArtifactError
from cloudrt.images.image import load_image
from cloudrt.inference.pipeline import Segmenter
from cloudrt.masks.postprocess import apply_rules
from cloudrt.masks.rule import Rule
from cloudrt.model.artifact import Artifact
from cloudrt.model.checkpoint import Checkpoint
from cloudrt.model.network import InferenceGraph
from cloudrt.options import RunOptions
from cloudrt.system.files import sha256
from cloudrt.system.progress import no_progress

CPU = RunOptions("cpu")


def test_without_torch_the_peer_is_skipped_by_name(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "cloudrt.export.ensemble", raising=False)  # imports torch
    checkpoint = tmp_path / "best.pth"
    checkpoint.touch()
    options = BenchOptions((model,), images, run=CPU, repeat=1, checkpoints=(checkpoint,), only=("stages",))
    done = run_bench(options, tmp_path / "b.json", no_progress)
    assert done.peer == "ONNX Runtime CPU fp32, batch 1"
    assert "torch is not installed: pip install '.[train]'" in done.skipped[networks.TorchNetwork.name]


def test_torch_outputs_equal_those_of_the_inference_graph(checkpoint: Path, images: Path) -> None:
    """The notebook's steps in NumPy and OpenCV give what the artifact computes in its graph."""
    loaded = Checkpoint.load(checkpoint)
    graph = InferenceGraph(loaded.network(), loaded.config).eval()
    peer = networks.TorchNetwork(networks.load_ensemble([checkpoint], Artifact(checkpoint_sha256=sha256(checkpoint))))
    for path in sorted(images.iterdir()):
        image = load_image(path, (64, 96))
        image[:, 20:30] = 0  # a band without data
        with torch.no_grad():
            wanted = graph(torch.from_numpy(image[None]))[0].numpy().transpose(0, 2, 1)
        probability, presence = peer(image)
        assert presence is None
        assert probability.dtype == np.float32
        # At the edge of a band, the share with data may be one half up to rounding: both results are correct.
        edge = (probability == 0) != (wanted == 0)
        assert edge.mean() < 0.005
        assert np.abs(np.round(probability * 255) - wanted)[~edge].max() <= 1
        assert 0.1 < (wanted[0] == 0).mean() < 0.5


@pytest.mark.parametrize("alike", [True, False])
def test_a_checkpoint_makes_torch_the_peer(
    checkpoint: Path, images: Path, tmp_path: Path, alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if alike:  # accept any masks: the artifact does not contain the network of the checkpoint
        monkeypatch.setattr(agreement, "LEAST_DICE", 0)
    model = tiny_artifact(tmp_path / "model.onnx", checkpoint_sha256=sha256(checkpoint))
    one = RunOptions("cpu", 1)
    options = BenchOptions(
        (model,), images, max_images=1, run=one, repeat=1, checkpoints=(checkpoint,), only=("stages",)
    )
    done = run_bench(options, tmp_path / "b.json", no_progress)
    if not alike:
        assert done.peer == networks.OnnxNetwork(model).name
        assert "its masks differ from ours" in done.skipped[networks.TorchNetwork.name]
        return
    assert done.peer == networks.TorchNetwork.name
    assert done.skipped == {}
    assert done.options.command()[-4:] == ["--only", "stages", "--checkpoint", "best.pth"]


def test_a_checkpoint_of_another_model_is_refused(checkpoint: Path, model: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a checkpoint the artifact was exported from"):
        run_bench(BenchOptions((model,), images, run=CPU, checkpoints=(checkpoint,)), tmp_path / "b.json", no_progress)


def test_an_artifact_of_two_networks_needs_both_checkpoints(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.pth" for number in range(3)]
    made = [make_checkpoint(path, seed=number) for number, path in enumerate(paths)]
    artifact = describe(Ensemble(tuple(made[:2]), tuple(sha256(path) for path in paths[:2])), "fp32")
    assert len(networks.load_ensemble(paths[:2], artifact).checkpoints) == 2
    os.mkfifo(tmp_path / "pipe")
    for given, reason in (
        ([tmp_path / "pipe"], "pipe is not a regular file"),
        (paths[:1], "averages 2 networks, found 1 of their checkpoints: give all of them"),
        ([paths[1], paths[1]], "one of the checkpoints is given twice"),
        (paths[1:], "2.pth is not a checkpoint the artifact was exported from"),
    ):
        with pytest.raises(ArtifactError, match=reason):
            networks.load_ensemble(given, artifact)


@pytest.mark.parametrize("members", [1, 2])
def test_networks_with_random_weights_have_the_shapes_of_the_artifacts(tmp_path: Path, members: int) -> None:
    paths = [tmp_path / f"{number}.pth" for number in range(members)]
    made = [make_checkpoint(path, seed=number, presence="head") for number, path in enumerate(paths)]
    ensemble = Ensemble(tuple(made), tuple(sha256(path) for path in paths), "h")
    random = networks.make_ensemble(trace(ensemble), describe(ensemble, "fp32"))
    assert random.networks_per_image == 2 * members
    for ours, theirs in zip(random.checkpoints, made, strict=True):
        assert {name: value.shape for name, value in ours.weights.items()} == {
            name: value.shape for name, value in theirs.weights.items()
        }
        assert not torch.equal(ours.weights["segmentation_head.0.weight"], theirs.weights["segmentation_head.0.weight"])


def test_the_notebooks_network_has_our_outputs(model: Path, images: Path) -> None:
    files = sorted(images.iterdir())
    peer = networks.OnnxNetwork(model, threads=1)
    with Segmenter(model, provider="cpu", batch_size=2) as segmenter:
        loaded = [load_image(path, (64, 96)) for path in files]
        for image, (levels, presence) in zip(loaded, infer(segmenter, loaded), strict=True):
            theirs, their_presence = peer(image)
            assert np.abs(theirs.transpose(0, 2, 1).astype(int) - levels).max() <= 1  # rounding depends on the batch
            assert their_presence is not None and presence is not None
            assert np.abs(their_presence.astype(int) - presence).max() <= 1


@pytest.mark.parametrize(
    "rule", [Rule(127, 50), Rule(0, 0), Rule(255, 0), Rule(90, 10, gate_threshold=200, gate_pixels=400)]
)
def test_both_forms_of_the_notebooks_post_processing_equal_ours(rule: Rule) -> None:
    """At many thresholds; the threshold for float maps must separate the same two levels as that for uint8 maps."""
    rng = np.random.default_rng(5)
    levels = cv2.resize(rng.integers(0, 256, (12, 9), np.uint8), (60, 90), interpolation=cv2.INTER_CUBIC)[None]
    view = levels.transpose(0, 2, 1)
    for threshold in range(0, 256, 5) if rule.min_area else [rule.threshold]:
        rules = [Rule(threshold, rule.min_area, rule.gate_threshold, rule.gate_pixels)]
        ours = apply_rules(np.ascontiguousarray(levels), rules)
        assert notebook.rle_rows(view, rules) == ours
        assert notebook.rle_rows(np.ascontiguousarray(view, np.float32) / np.float32(255), rules) == ours
