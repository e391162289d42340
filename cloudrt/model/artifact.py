"""An ONNX file and what is written inside it: all that inference needs to know lies in its `cloudrt.*` metadata.

`read_artifact` opens one and refuses what was not written by cloudrt; `write_metadata` is its counterpart for export
and tune. Values are JSON, so that any ONNX viewer shows them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cloudrt.errors import ArtifactError, DataError
from cloudrt.labels import CLOUDS, FIELDS, Grid, Labels
from cloudrt.masks.postprocess import Rule

if TYPE_CHECKING:
    import onnx

ARTIFACT_FORMAT = 1
PREFIX = "cloudrt."
PRECISIONS = ("fp32", "fp16", "bf16", "int8")


@dataclass(frozen=True)
class Artifact:
    """What an artifact says of itself.

    Parameters
    ----------
    labels
        Classes and grids.
    input_size
        Height and width of the images that enter.
    mean, std
        Of the RGB channels, in levels 0..255; applied inside the graph.
    rules
        One a class; may be empty in an artifact of a network that was never validated, and then it cannot segment.
    architecture, encoder, options
        The network, by segmentation_models_pytorch's names.
    precision
        fp32, fp16, bf16 or int8: what the network inside computes in; the edges are always float32.
    kept_fp32
        Names of the network's layers that stay in fp32 beside lower ones, because the gate failed without.
    int8_target
        What int8 layers are laid out for, "cpu" or "tensorrt"; empty in other precisions.
    subtract_no_data
        Whether the probability is zero where the image has no data.
    checkpoint_sha256
        Of the checkpoint that it was exported from.
    validation_dice
        Mean Dice of checkpoint and rules on held-out images; out of fold where `cloudrt tune` found the rules.
    parity
        The figures of export's comparison with PyTorch.
    versions
        Of the libraries that made it.
    weights_license
        What the weights' origin asks for.
    tta
        Which flips of the image the probability is the mean of: none, h, v or hv.
    members
        Of an ensemble, one a checkpoint: architecture, encoder, Dice and SHA-256; empty where there is but one.
    tuning
        How `cloudrt tune` found the rules; empty where training did.
    """

    labels: Labels = CLOUDS
    input_size: Grid = (320, 640)
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    rules: tuple[Rule, ...] = ()
    architecture: str = ""
    encoder: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    kept_fp32: tuple[str, ...] = ()
    int8_target: str = ""
    subtract_no_data: bool = False
    checkpoint_sha256: str = ""
    validation_dice: float = 0.0
    parity: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    weights_license: str = ""
    tta: str = "none"
    members: list[dict[str, Any]] = field(default_factory=list)
    tuning: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise DataError(f"precision is one of {', '.join(PRECISIONS)}, found {self.precision!r}")
        if self.rules and len(self.rules) != len(self.labels.classes):
            raise DataError(f"{len(self.rules)} rules for {len(self.labels.classes)} classes")
        if len(self.input_size) != 2 or len(self.mean) != 3 or len(self.std) != 3:
            raise DataError("input_size is (height, width); mean and std have one value a channel")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, with the labels' fields among them."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "labels"}
        values["rules"] = [rule.to_dict() for rule in self.rules]
        for name in ("input_size", "mean", "std", "kept_fp32"):
            values[name] = list(values[name])
        return {"format": ARTIFACT_FORMAT, **self.labels.to_dict(), **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        rest = dict(values)
        if rest.pop("format", None) != ARTIFACT_FORMAT:
            raise DataError(f"format {values.get('format')} is not the one that this version reads ({ARTIFACT_FORMAT})")
        try:
            named = {name: rest.pop(name) for name in FIELDS if name in rest or name != "key_column"}
            labels = Labels.from_dict(named)
            rest["rules"] = tuple(Rule.from_dict(rule) for rule in rest["rules"])
            for name in ("input_size", "mean", "std"):
                rest[name] = tuple(rest[name])
            rest["kept_fp32"] = tuple(rest.get("kept_fp32", ()))  # files of earlier versions are without
            return cls(labels=labels, **rest)
        except (KeyError, TypeError) as error:
            raise DataError(f"the metadata is incomplete: {error}") from error

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """(C, W_out, H_out) of one image's probability."""
        height, width = self.labels.submit_grid
        return len(self.labels.classes), width, height


def read_artifact(path: str | Path) -> Artifact:
    """Read what an artifact says of itself.

    Raises
    ------
    ArtifactError
        No such file, not an ONNX model, without cloudrt's metadata, or with a graph that does not fit them.
    """
    return parse_artifact(load_model(path), path)


def load_model(path: str | Path) -> onnx.ModelProto:
    """Load an ONNX file; see `read_artifact` for the errors."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing: make one with cloudrt-export best.pth") from None
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        raise ArtifactError(f"{path} is not an ONNX model, or is damaged") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error


def parse_artifact(model: onnx.ModelProto, path: str | Path) -> Artifact:
    """Return what a loaded model says of itself; `path` is for the errors."""
    texts = {p.key.removeprefix(PREFIX): p.value for p in model.metadata_props if p.key.startswith(PREFIX)}
    if not texts:
        raise ArtifactError(
            f"{path} has no cloudrt metadata, so its classes, sizes and rules are unknown: "
            "make an artifact with cloudrt-export best.pth"
        )
    try:
        artifact = Artifact.from_dict({name: json.loads(text) for name, text in texts.items()})
    except (json.JSONDecodeError, DataError) as error:
        raise ArtifactError(f"{path}: {error}: make it again with cloudrt-export best.pth") from error
    _check_graph(model, artifact, path)
    return artifact


def write_metadata(model: onnx.ModelProto, artifact: Artifact) -> None:
    """Replace the model's `cloudrt.*` metadata."""
    kept = {p.key: p.value for p in model.metadata_props if not p.key.startswith(PREFIX)}
    del model.metadata_props[:]
    ours = {PREFIX + name: json.dumps(value) for name, value in artifact.to_dict().items()}
    for key, value in (kept | ours).items():
        model.metadata_props.add(key=key, value=value)


def default_model() -> Path:
    """Return ./model.onnx where there is one, else the model that ships with the package.

    Raises
    ------
    ArtifactError
        Neither is there.
    """
    here = Path("model.onnx")
    if here.is_file():
        return here
    shipped = Path(str(files("cloudrt.model"))) / "shipped" / "clouds.onnx"
    if shipped.is_file():
        return shipped
    raise ArtifactError("no model.onnx here and none ships with this package: make one with cloudrt-export best.pth")


def _check_graph(model: onnx.ModelProto, artifact: Artifact, path: str | Path) -> None:
    """Refuse a graph whose input or outputs are not those of an artifact with this metadata."""
    import onnx

    height, width = artifact.input_size
    classes = len(artifact.labels.classes)
    expected: dict[str, tuple[int, ...]] = {
        "image": (height, width, 3),
        "probability": artifact.output_shape,
        "presence": (classes,),
    }
    for value in [*model.graph.input, *model.graph.output]:
        kind = value.type.tensor_type
        shape = tuple(dimension.dim_value for dimension in kind.shape.dim)[1:]
        wanted = expected.get(value.name)
        if wanted is None or kind.elem_type != onnx.TensorProto.UINT8 or shape != wanted:
            raise ArtifactError(
                f"{path}: {value.name!r} is {shape} an image, and the metadata say {wanted}, uint8: "
                "make the artifact anew with cloudrt-export"
            )
    if [value.name for value in model.graph.input] != ["image"] or "probability" not in {
        v.name for v in model.graph.output
    }:
        raise ArtifactError(f"{path}: an artifact has the input 'image' and the output 'probability'")


def graph_bytes(model: onnx.ModelProto) -> bytes:
    """Return a model without its metadata: what runs, whatever rules are stored beside it."""
    from onnx import ModelProto

    bare = ModelProto()
    bare.CopyFrom(model)
    del bare.metadata_props[:]
    return bare.SerializeToString()


def fix_batch(model: onnx.ModelProto, batch_size: int) -> onnx.ModelProto:
    """Return a copy whose input has a fixed N; reading that is quicker than reading it free and reshaping it."""
    from onnx import ModelProto

    fixed = ModelProto()
    fixed.CopyFrom(model)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch_size
    return fixed
