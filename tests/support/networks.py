"""Small untrained networks, as checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cloudrt.masks.rule import Rule
from cloudrt.model.checkpoint import Checkpoint
from cloudrt.model.network import InferenceGraph, build_network
from cloudrt.model.network_config import NetworkConfig

OPTIONS = {"decoder_pyramid_channels": 16, "decoder_segmentation_channels": 32}


def make_checkpoint(
    path: Path, encoder: str = "resnet18", rules: bool = True, seed: int = 0, **config_values: Any
) -> Checkpoint:
    """Write and return a checkpoint of an FPN with random weights, for images of 96x64 pixels by default."""
    torch.manual_seed(seed)
    config = NetworkConfig("FPN", encoder, OPTIONS, **{"input_size": (64, 96), **config_values})
    network = build_network(config)
    checkpoint = Checkpoint(config, network.state_dict(), (Rule(127, 500),) * 4 if rules else (), 0.5, 1)
    checkpoint.save(path)
    return checkpoint


def update_batchnorm(network: torch.nn.Module) -> None:
    """Set the statistics of BatchNorm from three batches of noise.

    With the initial statistics, the output of a deep network is almost constant.
    """
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(4, 3, 64, 96))


def probability(path: Path, image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The unrounded probability (N, C, H_out, W_out) of a checkpoint's network for (N, H, W, 3) images."""
    loaded = Checkpoint.load(path)
    graph = InferenceGraph(loaded.network(), loaded.config).eval()
    with torch.inference_mode():
        transposed, _ = graph.predict_probability(torch.from_numpy(image).float().permute(0, 3, 1, 2))
    return transposed.transpose(2, 3).numpy()
