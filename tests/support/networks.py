"""Small untrained networks, as checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cloudrt.masks.postprocess import Rule
from cloudrt.model.network import Checkpoint, NetworkConfig, build_network

OPTIONS = {"decoder_pyramid_channels": 16, "decoder_segmentation_channels": 32}


def make_checkpoint(
    path: Path, encoder: str = "resnet18", rules: bool = True, seed: int = 0, **config_values: Any
) -> Checkpoint:
    torch.manual_seed(seed)
    config = NetworkConfig("FPN", encoder, OPTIONS, **{"input_size": (64, 96), **config_values})
    network = build_network(config)
    checkpoint = Checkpoint(config, network.state_dict(), (Rule(127, 500),) * 4 if rules else (), 0.5, 1)
    checkpoint.save(path)
    return checkpoint
