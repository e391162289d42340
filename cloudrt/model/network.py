"""The network, shared by training and export. Only this module and `checkpoint` import torch in the runtime.

`build_network` builds the segmentation network by name. `InferenceGraph` adds what the artifact computes
before and after it, from a uint8 image to a uint8 probability; validation, the search of rules and parity use it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from cloudrt.errors import DataError
from cloudrt.images.image import NO_DATA_LEVEL
from cloudrt.model.network_config import NetworkConfig
from cloudrt.system.suggest import check_name

HEAD_DROPOUT = 0.2
RESERVED = ("encoder_name", "encoder_weights", "in_channels", "classes", "activation", "aux_params")
FINEST_LEVEL = "finest_level"
"""Option of an FPN, in addition to those of segmentation_models_pytorch: the finest level of the pyramid, 2 or 3."""
LARGEST_TOP_K = 3840
"""Largest k that TensorRT's TopK layer supports."""
HAS_DATA_SHARE = 0.4917
"""Smallest fraction of a neighbourhood that must have data: about half, but not a value that the mean of 25 pixels and
a resize can give exactly, because a tie would depend on rounding."""


def build_network(config: NetworkConfig) -> nn.Module:
    """Build the network with random weights: normalised images, (N, 3, H, W) float -> logits, (N, C, H, W).

    With a classification head, its output is a pair: these logits, and (N, C) logits of the presence of each class.
    Nothing is downloaded.

    Raises
    ------
    DataError
        An unknown architecture, encoder or option.
    """
    import segmentation_models_pytorch as smp

    architectures = smp.MODEL_ARCHITECTURES_MAPPING
    check_name("architecture", config.architecture.lower(), list(architectures))
    # smp ignores unknown arguments: without this check, the default would be used for a mistyped one.
    parameters = inspect.signature(architectures[config.architecture.lower()]).parameters
    arguments = [name for name, one in parameters.items() if one.kind is not one.VAR_KEYWORD]
    options = dict(config.options)
    coarse = config.architecture.lower() == "fpn" and _pops_finest_level(options)
    for option in options:
        if option in RESERVED:
            raise DataError(f"--set {option}: cloudrt sets this argument itself")
        check_name(f"argument of {config.architecture}", option, arguments)
    head: dict[str, Any] = {}
    if config.presence == "head":
        head = {"aux_params": {"classes": len(config.labels.classes), "dropout": HEAD_DROPOUT}}
    try:
        network = smp.create_model(
            config.architecture,
            config.encoder,
            encoder_weights=None,
            in_channels=3,
            classes=len(config.labels.classes),
            **(options | head),
        )
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, KeyError) and "encoder name" in str(error):
            check_name("encoder", config.encoder, list(smp.encoders.encoders))
        raise DataError(f"{config.architecture} with encoder {config.encoder} cannot be built: {error}") from error
    assert isinstance(network, nn.Module)
    decoder: Any = getattr(network, "decoder", None)
    if getattr(getattr(decoder, "merge", None), "policy", None) == "add":  # an FPN
        decoder.merge = SumMaps()
    if coarse:
        network.decoder = CoarseDecoder(decoder)
    return network


def _pops_finest_level(options: dict[str, Any]) -> bool:
    """Remove `FINEST_LEVEL` from the options of an FPN; return whether the finest level of its pyramid is left out."""
    level = options.pop(FINEST_LEVEL, 2)
    if level not in (2, 3):
        raise DataError(f"--set {FINEST_LEVEL}: must be 2 or 3, found {level}")
    if level == 2:
        return False
    if options.get("decoder_merge_policy", "add") != "add":
        raise DataError(f"--set {FINEST_LEVEL}=3 needs decoder_merge_policy=add")
    upsampling = options.get("upsampling", 4)
    if type(upsampling) is not int:
        raise DataError(f"--set upsampling: must be a whole number, found {upsampling!r}")
    options["upsampling"] = 2 * upsampling  # the levels are summed at half the size
    return True


class CoarseDecoder(nn.Module):
    """The decoder of an FPN without its finest level: the sum of the levels 3 to 5, at 1/8 of the size of the image.

    The finest level takes about 40% of the multiplications of an FPN with EfficientNet-Lite0.

    Parameters
    ----------
    decoder
        An FPN decoder of segmentation_models_pytorch, of which parts are used.
    """

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.p5, self.p4, self.p3 = decoder.p5, decoder.p4, decoder.p3
        self.seg_blocks = decoder.seg_blocks[1:]  # they enlarge by 4, 2 and 1
        self.merge, self.dropout = decoder.merge, decoder.dropout

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Return the sum for the encoder's maps, (N, C_i, H / 2**i, W / 2**i) at level i."""
        c3, c4, c5 = features[-3:]
        p5 = self.p5(c5)
        p4 = self.p4(p5, c4)
        p3 = self.p3(p4, c3)
        levels = zip(self.seg_blocks, (p5, p4, p3), strict=True)
        found: torch.Tensor = self.dropout(self.merge([block(level) for block, level in levels]))
        return found


class SumMaps(nn.Module):
    """The sum of maps of equal shape; segmentation_models_pytorch copies them to one tensor first."""

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """Return the sum."""
        return sum(maps[1:], maps[0])


class InferenceGraph(nn.Module):
    """What the artifact computes: images, (N, H, W, 3) uint8 RGB -> probability, (N, C, W_out, H_out) uint8.

    With a presence output, the result is a pair: the probability, and (N, C) uint8 presence levels. The probability is
    on the transposed submission grid, so that memory order is RLE order.

    Parameters
    ----------
    network
        From `build_network`.
    config
        Its configuration.
    network_dtype
        Data type that the network computes in; the other operations are in float32.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: nn.Module, config: NetworkConfig, network_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.network = network
        self.network_dtype = network_dtype
        self.submit_grid = config.labels.submit_grid
        self.subtract_no_data = config.subtract_no_data
        self.top_k = config.top_k if config.presence == "top-k" else 0
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the output of the artifact for (N, H, W, 3) uint8 images; see the class."""
        return self.quantise_outputs(*self.predict_probability(image.to(torch.float32).permute(0, 3, 1, 2)))

    def predict_probability(
        self, levels: torch.Tensor, views: tuple[tuple[int, ...], ...] = ((),)
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the probabilities of images on the transposed submission grid.

        Parameters
        ----------
        levels
            (N, 3, H, W) float32, 0..255.
        views
            Test-time augmentation; see `VIEWS`. The logits are averaged over the views, before they are enlarged.

        Returns
        -------
        probability
            (N, C, W_out, H_out) float32, 0..1.
        presence
            (N, C) float32, 0..1, of the classification head; None without one.
        """
        normalised = ((levels - self.mean) / self.std).to(self.network_dtype)
        if len(views) > 1:  # all views in one batch, so that the graph contains the network once
            normalised = torch.cat([normalised.flip(view) if view else normalised for view in views])
        found = self.network(normalised)
        logits, head = found if isinstance(found, tuple) else (found, None)
        logits = logits.to(torch.float32)
        if len(views) > 1:  # flipped back and averaged at the smaller size: one resize and one sigmoid for all views
            each = logits.reshape(len(views), -1, *logits.shape[1:])
            logits = torch.stack([one.flip(view) if view else one for one, view in zip(each, views, strict=True)]).mean(
                0
            )
            head = None if head is None else head.to(torch.float32).reshape(len(views), -1, head.shape[1]).mean(0)
        probability = torch.sigmoid(self.enlarge(logits))
        presence = None if head is None else torch.sigmoid(head.to(torch.float32))
        if self.subtract_no_data:
            probability = probability * self._has_data(levels)
        return probability, presence

    def quantise_outputs(
        self, probability: torch.Tensor, presence: torch.Tensor | None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the output of the artifact for a result of `predict_probability`, or the mean of several results."""
        if self.top_k:
            presence = mean_of_highest(probability.flatten(2), self.top_k)
        levels = self.quantise(probability)
        return levels if presence is None else (levels, torch.round(presence * 255).to(torch.uint8))

    @staticmethod
    def quantise(probability: torch.Tensor) -> torch.Tensor:
        """Convert probabilities to levels, 0..255 uint8, of the same shape."""
        return torch.round(probability * 255).to(torch.uint8)

    def enlarge(self, maps: torch.Tensor) -> torch.Tensor:
        """Transpose and resize (N, C, H, W) to (N, C, W_out, H_out), with half-pixel centres (OpenCV's INTER_LINEAR).

        The maps are transposed before they are enlarged, because they are smaller then.
        """
        small, size = maps.transpose(2, 3), self.submit_grid[::-1]
        return functional.interpolate(small, size=size, mode="bilinear", align_corners=False)

    def _has_data(self, levels: torch.Tensor) -> torch.Tensor:
        """Return (N, 1, W_out, H_out) float32: 1 where about half of the 5x5 neighbourhood or more has data."""
        bright = (levels.amax(dim=1, keepdim=True) > NO_DATA_LEVEL).to(torch.float32)
        share = functional.avg_pool2d(bright, 5, stride=1, padding=2, count_include_pad=False)
        return (self.enlarge(share) >= HAS_DATA_SHARE).to(torch.float32)


def mean_of_highest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return the mean of the `count` highest values of each map.

    If `count` is above `LARGEST_TOP_K`, the smallest of these values is found by bisection instead of sorting, with
    an error of the mean of at most about 1e-6.

    Parameters
    ----------
    values
        (N, C, P) float32, 0..1.
    count
        From 1 to P.

    Returns
    -------
    torch.Tensor
        (N, C) float32.
    """
    if count <= LARGEST_TOP_K:
        return values.topk(count).values.mean(dim=2)
    low, high = torch.zeros_like(values[..., :1]), torch.ones_like(values[..., :1])
    for _ in range(20):
        middle = (low + high) / 2
        enough = (values > middle).to(torch.float32).sum(dim=2, keepdim=True) >= count
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    above = (values > high).to(torch.float32)
    # The remaining ones of the `count` highest values are within 1e-6 of `high`.
    total = (values * above).sum(dim=2) + (count - above.sum(dim=2)) * high[..., 0]
    return total / count
