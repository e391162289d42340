"""Segmentation of cloud organisations in satellite images, from JPEG files to run-length encoded rows.

The names below load on first use, so that `import cloudrt` stays quick; none of them ever imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cloudrt.system.telemetry import disable_telemetry
from cloudrt.system.versions import VERSION

if TYPE_CHECKING:
    from cloudrt.errors import ArtifactError as ArtifactError
    from cloudrt.errors import CloudrtError as CloudrtError
    from cloudrt.errors import DataError as DataError
    from cloudrt.errors import ImageError as ImageError
    from cloudrt.errors import ProviderError as ProviderError
    from cloudrt.errors import RleError as RleError
    from cloudrt.inference.pipeline import Segmenter as Segmenter
    from cloudrt.inference.results import Result as Result
    from cloudrt.inference.results import to_dataframe as to_dataframe
    from cloudrt.inference.run import infer as infer
    from cloudrt.labels import CLOUDS as CLOUDS
    from cloudrt.labels import Labels as Labels
    from cloudrt.masks.metric import dice as dice
    from cloudrt.masks.metric import score as score
    from cloudrt.masks.postprocess import apply_rules as apply_rules
    from cloudrt.masks.postprocess import postprocess as postprocess
    from cloudrt.masks.postprocess import postprocess_batch as postprocess_batch
    from cloudrt.masks.rle import rle_decode as rle_decode
    from cloudrt.masks.rle import rle_encode as rle_encode
    from cloudrt.masks.rule import Rule as Rule
    from cloudrt.model.artifact import read_artifact as read_artifact
    from cloudrt.options import RunOptions as RunOptions

disable_telemetry()

__version__ = VERSION

_MODULES = {
    "ArtifactError": "errors",
    "CLOUDS": "labels",
    "CloudrtError": "errors",
    "DataError": "errors",
    "ImageError": "errors",
    "Labels": "labels",
    "ProviderError": "errors",
    "Result": "inference.results",
    "RleError": "errors",
    "Rule": "masks.rule",
    "RunOptions": "options",
    "Segmenter": "inference.pipeline",
    "apply_rules": "masks.postprocess",
    "dice": "masks.metric",
    "infer": "inference.run",
    "postprocess": "masks.postprocess",
    "postprocess_batch": "masks.postprocess",
    "read_artifact": "model.artifact",
    "rle_decode": "masks.rle",
    "rle_encode": "masks.rle",
    "score": "masks.metric",
    "to_dataframe": "inference.results",
}
"""Public name -> the module that defines it."""

__all__ = ["__version__", *_MODULES]  # noqa: PLE0604 - the names are the keys above


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'cloudrt' has no attribute {name!r}")
    value = getattr(import_module(f"cloudrt.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
