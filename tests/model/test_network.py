"""Networks: architectures, names, and the inference graph against NumPy and OpenCV."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional

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


def test_an_fpn_without_its_finest_level_equals_plain_operations() -> None:
    config = NetworkConfig("FPN", "resnet18", {"decoder_pyramid_channels": 32, "finest_level": 3}, (64, 96))
    network: Any = build_network(config).eval()
    image = torch.rand(1, 3, 64, 96)
    weights = network.decoder.state_dict()
    with torch.no_grad():
        found = network(image)
        *_, c3, c4, c5 = network.encoder(image)
        levels = [functional.conv2d(c5, weights["p5.weight"], weights["p5.bias"])]
        for name, skip in (("p4", c4), ("p3", c3)):
            lateral = functional.conv2d(skip, weights[f"{name}.skip_conv.weight"], weights[f"{name}.skip_conv.bias"])
            levels.append(functional.interpolate(levels[-1], scale_factor=2, mode="nearest") + lateral)
        total = torch.zeros(1, 128, 8, 12)  # 1/8 of the image
        for number, (level, doublings) in enumerate(zip(levels, (2, 1, 0), strict=True)):
            x = level
            for step in range(max(1, doublings)):
                block = f"seg_blocks.{number}.block.{step}.block"
                x = functional.conv2d(x, weights[f"{block}.0.weight"], padding=1)
                x = functional.group_norm(x, 32, weights[f"{block}.1.weight"], weights[f"{block}.1.bias"]).relu()
                if doublings:
                    x = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            total += x
        head = network.segmentation_head.state_dict()
        logits = functional.conv2d(total, head["0.weight"], head["0.bias"])
        wanted = functional.interpolate(logits, scale_factor=8, mode="bilinear", align_corners=True)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not any("p2" in name for name in weights)


@pytest.mark.parametrize(
    ("architecture", "options", "match"),
    [
        ("FPN", {"finest_level": 4}, "must be 2 or 3"),
        ("FPN", {"finest_level": 3, "decoder_merge_policy": "cat"}, "decoder_merge_policy=add"),
        ("FPN", {"finest_level": 3, "upsampling": None}, "upsampling: must be a whole number"),
        ("Unet", {"finest_level": 3}, "no argument of Unet"),
    ],
)
def test_unusable_finest_levels_are_refused(architecture: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        build_network(NetworkConfig(architecture, "resnet18", options, (64, 64)))


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
