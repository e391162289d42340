"""Cloud-organisation segmentation, from a JPEG to the run-length row that the scorer takes.

The names below load on first use, so that `import cloudrt` stays quick; none of them ever imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Not lazy: the function shares its module's name, and must be bound after the import system has bound the module.
from cloudrt.postprocess import Rule, apply_rules, postprocess, postprocess_batch

if TYPE_CHECKING:
    from cloudrt.artifact import read_artifact as read_artifact
    from cloudrt.errors import CloudrtError as CloudrtError
    from cloudrt.errors import RleError as RleError
    from cloudrt.labels import CLOUDS as CLOUDS
    from cloudrt.labels import Labels as Labels
    from cloudrt.metric import dice as dice
    from cloudrt.metric import score as score
    from cloudrt.pipeline import Segmenter as Segmenter
    from cloudrt.rle import rle_decode as rle_decode
    from cloudrt.rle import rle_encode as rle_encode

__version__ = "0.1.0"

_HOMES = {
    "CLOUDS": "labels",
    "CloudrtError": "errors",
    "Labels": "labels",
    "RleError": "errors",
    "Segmenter": "pipeline",
    "dice": "metric",
    "read_artifact": "artifact",
    "rle_decode": "rle",
    "rle_encode": "rle",
    "score": "metric",
}

__all__ = ["Rule", "__version__", "apply_rules", "postprocess", "postprocess_batch", *_HOMES]  # noqa: PLE0604 - the names are the keys above


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cloudrt' has no attribute {name!r}")
    value = getattr(import_module(f"cloudrt.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
