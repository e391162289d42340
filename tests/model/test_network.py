"""Networks: architectures, names, and the inference graph against NumPy and OpenCV."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from cloudrt.errors import DataError
from cloudrt.model.network import InferenceGraph, build_network
from cloudrt.model.network_config import NetworkConfig


@pytest.mark.parametrize("architecture", ["Unet", "DeepLabV3Plus", "UPerNet"])
def test_other_architectures(architecture: str) -> None:
    network = build_network(NetworkConfig(architecture, "resnet18", {}, (64, 96))).eval()
    assert network(torch.zeros(1, 3, 64, 96)).shape == (1, 4, 64, 96)


def test_unknown_names_suggest_near_ones() -> None:
    with pytest.raises(DataError, match="resnet50"):
        build_network(NetworkConfig("FPN", "resnet5", {}, (64, 64)))
    with pytest.raises(DataError, match="fpn"):
        build_network(NetworkConfig("FNP", "resnet18", {}, (64, 64)))
    with pytest.raises(DataError, match="no argument of FPN"):
        build_network(NetworkConfig("FPN", "resnet18", {"no_such": 1}, (64, 64)))
    with pytest.raises(DataError, match="multiples of 32"):
        NetworkConfig(input_size=(100, 96))


def test_graph_equals_numpy() -> None:
    """The inference graph against numpy and OpenCV: normalise, resize, sigmoid, no-data, round, transpose."""

    class Channels(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x[:, :1] - 1], dim=1)

    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(40, 255, (2, 64, 96, 3), np.uint8)[0], (0, 0), 3)
    image[:, :30] = 0
    config = NetworkConfig(input_size=(64, 96), subtract_no_data=True)
    found = InferenceGraph(Channels(), config).eval()(torch.from_numpy(image[None])).numpy()[0]
    logits = (image.astype(np.float32) - np.array(config.mean, np.float32)) / np.array(config.std, np.float32)
    logits = np.concatenate([logits, logits[..., :1] - 1], axis=2)
    large = np.stack([cv2.resize(logits[..., c], (525, 350), interpolation=cv2.INTER_LINEAR) for c in range(4)])
    wanted = np.rint(255 / (1 + np.exp(-large)))
    edge = round(30 / 96 * 525)
    wanted[:, :, :edge] = 0
    difference = np.abs(found.transpose(0, 2, 1).astype(int) - wanted)
    assert found.shape == (4, 525, 350)
    assert difference[:, :, : edge - 6].max() == 0
    assert difference[:, :, edge + 6 :].max() <= 1
