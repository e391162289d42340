"""What the weights of a run start from: nothing, ImageNet, another checkpoint, or the state of a run cut short."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cloudrt.errors import DataError
from cloudrt.labels import Labels
from cloudrt.model.network import Checkpoint, NetworkConfig, build_network

from .config import TrainConfig

logger = logging.getLogger(__name__)

STATE = "state.pth"
"""In a run's folder, until it is finished."""


KEYS = {"config", "images", "trainer", "history", "best_dice", "epoch"}


def read_state(folder: Path, config: TrainConfig) -> dict[str, Any] | None:
    """Return the state of the run that is to be resumed; None where it stopped before its first epoch began.

    Raises
    ------
    DataError
        The run is finished, had other options, or its state is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        if (folder / "best.pth").exists():
            raise DataError(f"{folder} is finished: give another --name, or --overwrite") from None
        logger.info("%s holds no state: beginning with the first epoch", folder)
        return None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"{folder / STATE} is damaged: --overwrite the run") from error
    if not isinstance(state, dict) or set(state) != KEYS or not isinstance(state["config"], dict):
        raise DataError(f"{folder / STATE} is damaged: --overwrite the run")
    differences = config.differences(state["config"])
    if differences:
        raise DataError(f"{folder} is another run: {'; '.join(differences)}. Give its options, or --overwrite")
    return state


def check_shape(network: nn.Module, config: NetworkConfig) -> None:
    """Run the network once, in evaluation, on black.

    Raises
    ------
    DataError
        It fails on this input size, or its logits do not have it.
    """
    network.eval()
    try:
        with torch.inference_mode():
            found = network(torch.zeros(1, 3, *config.input_size, device=next(network.parameters()).device))
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(f"{config.architecture} with {config.encoder} does not run on such images: {reason}") from error
    made = tuple((found[0] if isinstance(found, tuple) else found).shape[2:])
    if made != config.input_size:
        raise DataError(
            f"the network answers {made[1]}x{made[0]} to {config.input_size[1]}x{config.input_size[0]} pixels: leave "
            "--set upsampling, encoder_depth and the like as they are"
        )


def describe_images(
    names: Sequence[str], training: NDArray[np.int_], held_out: NDArray[np.int_], labels: Labels
) -> str:
    """Return what a run's images and classes are known by: a digest."""
    parts = [[names[position] for position in part] for part in (training.tolist(), held_out.tolist())]
    return hashlib.sha256(json.dumps([*parts, labels.to_dict()]).encode()).hexdigest()


def start(config: TrainConfig, network_config: NetworkConfig, resumed: bool) -> tuple[nn.Module, str]:
    """Return the network that a run starts with, and what the origin of its weights asks for.

    A resumed run's weights come from its state.

    Raises
    ------
    DataError
        See `build_network`; no weight of the checkpoint fits.
    ArtifactError
        See `Checkpoint.load`.
    """
    if config.init:
        network = build_network(network_config)
        source = Checkpoint.load(config.init)
        if not resumed:
            _take(network, source.weights, config.init)
        return network, source.weights_license
    if config.encoder_weights == "none":
        if not resumed:
            logger.info("encoder %s starts from scratch", config.encoder)
        return build_network(network_config), ""
    origin = f"encoder from ImageNet weights of {config.encoder}"
    if resumed:
        return build_network(network_config), origin
    logger.info("encoder %s starts from ImageNet weights, downloaded unless cached", config.encoder)
    return build_network(network_config, "imagenet"), origin


def _take(network: nn.Module, weights: dict[str, torch.Tensor], name: str) -> None:
    """Copy the weights that fit by name and shape; a head that is new, or of other classes, starts from scratch."""
    own = network.state_dict()
    fitting = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
    if any(key.startswith("encoder.") and key not in fitting for key in own):
        raise DataError(f"--init {name}: its encoder is another; start from a network with the same --encoder")
    network.load_state_dict(own | fitting)
    missing = sorted(set(own) - set(fitting))
    fresh = f"; from scratch: {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}" if missing else ""
    logger.info("%d of %d tensors start from %s%s", len(fitting), len(own), name, fresh)
