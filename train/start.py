"""The start of a run: initial weights (random, pre-trained or of a checkpoint), or the state of an interrupted run."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cloudrt.errors import DataError
from cloudrt.labels import Labels
from cloudrt.model.checkpoint import Checkpoint, is_finite, read_tensors
from cloudrt.model.network import build_network
from cloudrt.model.network_config import NetworkConfig
from cloudrt.system.files import sha256

from .config import TrainConfig
from .run_files import STATE
from .weights import find_weights, load_encoder, read_weights

logger = logging.getLogger(__name__)

TYPES = {
    "config": dict,
    "network": dict,
    "license": str,
    "images": str,
    "trainer": object,  # checked when it is loaded
    "history": list,
    "best_dice": float,
    "epoch": int,
}
"""Names and types of the values in a state."""


def read_state(folder: Path, config: TrainConfig, digests: dict[str, str]) -> dict[str, Any] | None:
    """Return the state of the run to resume; None if it was interrupted before the first epoch.

    Raises
    ------
    DataError
        The run is finished, had other options or files (see `check_inputs`) or is a cross-validation, or its state is
        damaged.
    """
    try:
        state: dict[str, Any] = read_tensors(folder / STATE)
    except FileNotFoundError:
        if (folder / "best.pth").exists():
            raise DataError(
                f"{folder} is finished: there is nothing to resume; to train again, use another --name"
            ) from None
        if (folder / "folds.json").exists() or any(folder.glob("fold-[0-9]*")):
            raise DataError(
                f"{folder} is a cross-validation: resume it with its --folds and without --fold, or use another --name"
            ) from None
        logger.info("%s contains no state: starting with the first epoch", folder)
        return None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"{folder / STATE} is damaged: use --overwrite") from error
    if (
        not isinstance(state, dict)
        or set(state) != set(TYPES)
        or not all(isinstance(state[name], kind) for name, kind in TYPES.items())
        or not all(isinstance(row, dict) for row in state["history"])
    ):
        raise DataError(f"{folder / STATE} is damaged, or from another version of cloudrt: use --overwrite")
    differences = config.differences(state["config"])
    if differences:
        raise DataError(f"{folder} had other options: {'; '.join(differences)}; use the same, or --overwrite")
    check_inputs(folder, digests)
    return state


def check_shape(network: nn.Module, config: NetworkConfig) -> None:
    """Run the network once on zeros.

    Raises
    ------
    DataError
        The network fails at this input size, or its output has another size.
    """
    network.eval()
    try:
        with torch.inference_mode():
            found = network(torch.zeros(1, 3, *config.input_size, device=next(network.parameters()).device))
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(f"{config.architecture} with {config.encoder} fails at this input size: {reason}") from error
    made = tuple((found[0] if isinstance(found, tuple) else found).shape[2:])
    if made != config.input_size:
        raise DataError(
            f"the network's output is {made[1]}x{made[0]}, not {config.input_size[1]}x{config.input_size[0]}: "
            "do not change its output size with --set (upsampling, encoder_depth)"
        )


def digest_inputs(config: TrainConfig) -> dict[str, str]:
    """Return the SHA-256 of the files that a run also reads when it is resumed: name of the option -> digest.

    Raises
    ------
    DataError
        A path that is missing, or not a regular file.
    """
    found = {}
    for name in ("teacher", "held_out"):
        path = Path(getattr(config, name))
        if getattr(config, name):
            if not path.is_file():
                raise DataError(f"{path} is {'not a regular file' if path.exists() else 'missing'}")
            found[name] = sha256(path)
    return found


def check_inputs(folder: Path, digests: dict[str, str]) -> None:
    """Raise DataError if a file in `digests` (see `digest_inputs`) is not the one that the run in `folder` has read."""
    before = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("sha256", {})
    for name, digest in digests.items():
        if before.get(name, digest) != digest:
            raise DataError(
                f"the file of {name} has changed since the run in {folder} began: restore it, or use --overwrite"
            )


def describe_images(
    names: Sequence[str], training: NDArray[np.int_], held_out: NDArray[np.int_], labels: Labels
) -> str:
    """Return a digest of the images and classes of a run."""
    parts = [[names[position] for position in part] for part in (training.tolist(), held_out.tolist())]
    return hashlib.sha256(json.dumps([*parts, labels.to_dict()]).encode()).hexdigest()


@dataclass(frozen=True)
class Start:
    """The network at the start of a run.

    Parameters
    ----------
    network
        On the CPU. A resumed run loads the weights of its state later.
    config
        Its configuration; mean and standard deviation are those of the pre-trained weights.
    license
        Source and licence of the pre-trained weights; "" without any.
    """

    network: nn.Module
    config: NetworkConfig
    license: str = ""


def start(config: TrainConfig, labels: Labels, state: dict[str, Any] | None = None) -> Start:
    """Build the network of a run and initialise its weights.

    Parameters
    ----------
    config
        The options of the run.
    labels
        Classes and grids of the data.
    state
        State of the run to resume, from `read_state`.

    Raises
    ------
    DataError
        The checkpoint `config.init` has another encoder, or weights that are not finite; see also `build_network`,
        `find_weights`, `read_weights` and `load_encoder`.
    ArtifactError
        See `Checkpoint.load`.
    """
    if state is not None:
        stored = NetworkConfig.from_dict(state["network"])
        return Start(build_network(stored), stored, state["license"])
    network_config = NetworkConfig(
        architecture=config.architecture,
        encoder=config.encoder,
        options=dict(config.options),
        input_size=config.input_size,
        labels=labels,
        presence=config.presence,
        top_k=config.top_k,
    )
    network = build_network(network_config)
    if config.init:
        source = Checkpoint.load(config.init)
        _take(network, source.weights, config.init)
        levels = replace(network_config, mean=source.config.mean, std=source.config.std)
        return Start(network, levels, source.weights_license)
    if config.encoder_weights == "none":
        logger.info("encoder %s: random initialisation", config.encoder)
        return Start(network, network_config)
    if config.encoder_weights == "imagenet":
        weights = find_weights(config.encoder)
    else:
        weights = read_weights(Path(config.encoder_weights), config.encoder)
    count = load_encoder(network, config.encoder, weights)
    logger.info("encoder %s: %d tensors from %s; licence: %s", config.encoder, count, weights.source, weights.license)
    return Start(network, replace(network_config, mean=weights.mean, std=weights.std), weights.provenance)


def _take(network: nn.Module, weights: dict[str, torch.Tensor], name: str) -> None:
    """Copy the weights that fit by name and shape; new heads and heads of other classes keep their initial weights."""
    own = network.state_dict()
    fitting = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
    if any(key.startswith("encoder.") and key not in fitting for key in own):
        raise DataError(f"--init {name} has another encoder: use a checkpoint with the same --encoder")
    bad = next((key for key, value in fitting.items() if not is_finite(value)), None)
    if bad is not None:
        raise DataError(f"--init {name}: {bad} contains NaN or infinity")
    network.load_state_dict(own | fitting)
    missing = sorted(set(own) - set(fitting))
    rest = f"; random: {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}" if missing else ""
    logger.info("%d of %d tensors initialised from %s%s", len(fitting), len(own), name, rest)
