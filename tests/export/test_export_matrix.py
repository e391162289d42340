"""Encoders and architectures through export, gate, ONNX Runtime and OpenVINO, with random weights at a small size.

One of them in every run; all with `make test-all` (the marker `slow`).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cloudrt.export.export import Target, export
from cloudrt.export.layers import layers_of
from cloudrt.export.source import ExportSource
from support.networks import update_batchnorm

from cloudrt.engines.choice import open_engine
from cloudrt.labels import Labels
from cloudrt.model.checkpoint import Checkpoint
from cloudrt.model.network import InferenceGraph, build_network
from cloudrt.model.network_config import NetworkConfig

SMALL = Labels(("Fish", "Flower", "Gravel", "Sugar"), (280, 420), (70, 105))
ALWAYS = (("FPN", "tu-convnext_atto"),)
NOTEBOOK = ("resnet50", "resnet101", "efficientnet-b2", "efficientnet-b7", "densenet121", "se_resnext101_32x4d")
FAMILIES = ("efficientnet-b0", "tu-resnest14d", "mobilenet_v2", "mit_b0")
ARCHITECTURES = ("Unet", "DeepLabV3Plus", "UPerNet")
CASES = [
    *ALWAYS,
    *(pytest.param("FPN", encoder, marks=pytest.mark.slow) for encoder in (*NOTEBOOK, *FAMILIES)),
    pytest.param("UPerNet", "mit_b0", marks=pytest.mark.slow),
    pytest.param("Unet", "tu-mobilenetv3_small_075", marks=pytest.mark.slow),
    *(pytest.param(architecture, "resnet18", marks=pytest.mark.slow) for architecture in ARCHITECTURES),
]


def make(path: Path, architecture: str, encoder: str) -> Checkpoint:
    """Write and return a checkpoint with random weights and updated statistics of BatchNorm."""
    torch.manual_seed(0)
    config = NetworkConfig(architecture, encoder, {}, (64, 96), labels=SMALL)
    network = build_network(config)
    update_batchnorm(network)
    checkpoint = Checkpoint(config, network.state_dict(), (), 0.5, 1)
    checkpoint.save(path)
    return checkpoint


@pytest.mark.parametrize(("architecture", "encoder"), CASES)
def test_export_and_every_runtime(tmp_path: Path, architecture: str, encoder: str) -> None:
    made = make(tmp_path / "best.pth", architecture, encoder)
    source = ExportSource(tmp_path / "best.pth")
    assert len(layers_of(source.model)) > 20
    random = np.random.default_rng(0)
    batch = random.integers(0, 256, (3, 64, 96, 3), np.uint8)
    graph = InferenceGraph(made.network(), made.config).eval()
    with torch.inference_mode():
        wanted = graph(torch.from_numpy(batch)).numpy().astype(int)
    assert wanted.std() > 1  # a constant answer would make every comparison pass
    for precision, largest in (("fp32", 1), ("fp16", 12)):
        done = export(source, tmp_path / f"{precision}.onnx", Target(precision))
        assert done.artifact.kept_fp32 == ()
        model = onnx.load(done.path)
        onnx.checker.check_model(model, full_check=True)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
        assert model.ir_version <= 10
        for provider in ("cpu", *(["openvino"] if find_spec("openvino") else [])):
            for size in (1, 3):
                assert_near(done.path, provider, batch[:size], wanted[:size], largest)


def assert_near(path: Path, provider: str, batch: Any, wanted: Any, largest: int) -> None:
    with open_engine(path, provider, len(batch)) as engine:
        difference = np.abs(engine.probability(batch).astype(int) - wanted)
    assert difference.max() <= largest, (path.name, provider, len(batch))
