"""The artifact: an ONNX file whose `cloudrt.*` metadata holds everything that inference needs.

`read_artifact` reads it and refuses files that cloudrt did not write; export and tune write it with `write_metadata`.
The values are JSON, so that ONNX viewers can show them. `onnx_file.py` reads and writes the file itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cloudrt.arguments import check_path
from cloudrt.errors import ArtifactError, DataError
from cloudrt.labels import CLOUDS, FIELDS, LABEL_GRID, Grid, Labels
from cloudrt.masks.rule import Rule
from cloudrt.model.onnx_file import CHECKSUM, load_model

if TYPE_CHECKING:
    import onnx

ARTIFACT_FORMAT = 1
PREFIX = "cloudrt."
PRECISIONS = ("fp32", "fp16", "bf16", "int8")


@dataclass(frozen=True)
class Artifact:
    """The metadata of an artifact.

    Parameters
    ----------
    labels
        Classes and grids.
    input_size
        Height and width of the input in pixels.
    mean, std
        Mean and standard deviation of the RGB channels, in levels 0..255; the graph normalises with them.
    rules
        One rule per class; empty if the network was never validated. An artifact without rules gives probabilities, but
        no masks.
    architecture, encoder, options
        The network; see `NetworkConfig`.
    precision
        Precision that the network computes in: "fp32", "fp16", "bf16" or "int8". The operations before and after the
        network are always float32.
    kept_fp32
        Layers that export left in fp32, because the model fails the parity gate if they have a lower precision.
    int8_target
        Runtime that the int8 layers are quantised for, "cpu" or "tensorrt"; empty in other precisions.
    subtract_no_data
        Whether the probability is set to zero where the image has no data.
    checkpoint_sha256
        SHA-256 of the exported checkpoint.
    validation_dice
        Mean Dice of the rules on held-out images; cross-validated if the training was complete, or `cloudrt tune` found
        the rules.
    parity
        Figures of the comparison with PyTorch; see `Parity`.
    versions
        Versions of the libraries that wrote the file.
    weights_license
        Source and licence of the pre-trained weights; empty without any.
    tta
        Test-time augmentation, the flips that the logits are averaged over: "none", "h", "v" or "hv".
    members
        Architecture, encoder, Dice and SHA-256 of each checkpoint of an ensemble; empty for a single one.
    tuning
        Figures of `cloudrt tune`; empty if the rules are those of training.
    field_of_view, pixels_per_degree
        Height and width of the training images in pixels, and their resolution on the Earth; larger images are cut
        into tiles of this size. 2100x1400 (width x height) at 100 in files that do not state them.

    Raises
    ------
    DataError
        A precision, text, Dice, size or resolution of the wrong type or out of range; a mean or std without three
        values; a number of rules that is not that of the classes. Other values are not checked.
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
    field_of_view: Grid = LABEL_GRID
    pixels_per_degree: float = 100.0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise DataError(f"precision must be one of {', '.join(PRECISIONS)}, found {self.precision!r}")
        for name in ("architecture", "encoder", "int8_target", "checkpoint_sha256", "weights_license", "tta"):
            text = getattr(self, name)
            if not isinstance(text, str) or not "".join(text.split()).isprintable():  # no terminal escapes
                raise DataError(f"{name} must be printable text, found {ascii(text)[:80]}")
        dice = self.validation_dice
        if isinstance(dice, bool) or not isinstance(dice, int | float) or not 0 <= dice <= 1:
            raise DataError(f"validation_dice must be a number from 0 to 1, found {ascii(dice)[:80]}")
        if self.rules and len(self.rules) != len(self.labels.classes):
            raise DataError(f"{len(self.rules)} rules for {len(self.labels.classes)} classes")
        sides = all(type(side) is int and side > 0 for side in self.input_size)
        if not sides or len(self.input_size) != 2 or len(self.mean) != 3 or len(self.std) != 3:
            raise DataError("input_size must be (height, width); mean and std must have one value per channel")
        if len(self.field_of_view) != 2 or not all(type(side) is int and side > 0 for side in self.field_of_view):
            raise DataError(f"field_of_view must be (height, width), found {self.field_of_view!r}")
        scale = self.pixels_per_degree
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < float("inf"):
            raise DataError(f"pixels_per_degree must be a positive number, found {scale!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; the keys of `labels` are at the top level."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "labels"}
        values["rules"] = [rule.to_dict() for rule in self.rules]
        for name in ("input_size", "mean", "std", "kept_fp32", "field_of_view"):
            values[name] = list(values[name])
        return {"format": ARTIFACT_FORMAT, **self.labels.to_dict(), **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return metadata from the values that `to_dict` returned; DataError if malformed or of another format."""
        rest = dict(values)
        if rest.pop("format", None) != ARTIFACT_FORMAT:
            raise DataError(
                f"format {values.get('format')} cannot be read by this version, which reads {ARTIFACT_FORMAT}"
            )
        try:
            named = {name: rest.pop(name) for name in FIELDS if name in rest or name != "key_column"}
            labels = Labels.from_dict(named)
            rest["rules"] = tuple(Rule.from_dict(rule) for rule in rest["rules"])
            for name in ("input_size", "mean", "std"):
                rest[name] = tuple(rest[name])
            rest["kept_fp32"] = tuple(rest.get("kept_fp32", ()))  # absent in files of earlier versions
            rest["field_of_view"] = tuple(rest.get("field_of_view", LABEL_GRID))  # likewise
            return cls(labels=labels, **rest)
        except (KeyError, TypeError) as error:
            raise DataError(f"a value of the metadata is missing, unknown or malformed: {error}") from error

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """(C, W_out, H_out) of one image's probability."""
        height, width = self.labels.submit_grid
        return len(self.labels.classes), width, height


def read_artifact(path: str | Path) -> Artifact:
    """Read the metadata of an artifact.

    Raises
    ------
    ArtifactError
        A missing file, a file that is not an ONNX model or has no cloudrt metadata, or a graph that does not match the
        metadata.
    DataError
        `path` is not a path.
    """
    check_path("path", path)
    return parse_artifact(load_model(path), path)


def parse_artifact(model: onnx.ModelProto, path: str | Path) -> Artifact:
    """Return the metadata of a loaded model; `path` is for error messages. The errors are those of `read_artifact`."""
    texts = {p.key.removeprefix(PREFIX): p.value for p in model.metadata_props if p.key.startswith(PREFIX)}
    texts.pop(CHECKSUM.removeprefix(PREFIX), None)
    if not texts:
        raise ArtifactError(
            f"{path} has no cloudrt metadata, so its classes, sizes and rules are unknown: "
            "export an artifact with cloudrt-export best.pth"
        )
    try:
        artifact = Artifact.from_dict({name: json.loads(text) for name, text in texts.items()})
    except (ValueError, OverflowError, RecursionError) as error:  # ValueError: DataError, invalid JSON
        reason = "".join(sign if sign.isprintable() else "?" for sign in " ".join(str(error).split())[:300])
        raise ArtifactError(f"{path}: {reason}: export it again with cloudrt-export best.pth") from error
    _check_graph(model, artifact, path)
    return artifact


def write_metadata(model: onnx.ModelProto, artifact: Artifact) -> None:
    """Replace the model's `cloudrt.*` metadata; the checksum is removed."""
    kept = {p.key: p.value for p in model.metadata_props if not p.key.startswith(PREFIX)}
    del model.metadata_props[:]
    ours = {PREFIX + name: json.dumps(value) for name, value in artifact.to_dict().items()}
    for key, value in (kept | ours).items():
        model.metadata_props.add(key=key, value=value)


def default_model() -> Path:
    """Return the path of ./model.onnx if it exists, else of the model that is shipped with the package.

    Raises
    ------
    ArtifactError
        Neither exists.
    """
    here = Path("model.onnx")
    if here.is_file():
        return here
    shipped = Path(str(files("cloudrt.model"))) / "shipped" / "clouds.onnx"
    if shipped.is_file():
        return shipped
    raise ArtifactError(
        "there is no model.onnx here, and this package was built without one: export one with cloudrt-export best.pth"
    )


def _check_graph(model: onnx.ModelProto, artifact: Artifact, path: str | Path) -> None:
    """Check that names, types and shapes of the graph's input and outputs match the metadata."""
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
        fault = ""
        if wanted is None:
            fault = f"is not one of the inputs and outputs of an artifact: {', '.join(expected)}"
        elif kind.elem_type != onnx.TensorProto.UINT8:
            fault = "is not uint8"
        elif shape != wanted:
            fault = f"has the shape {shape} per image, expected {wanted} from the metadata"
        if fault:
            raise ArtifactError(f"{path}: {value.name!r} {fault}: export it again with cloudrt-export")
    outputs = {value.name for value in model.graph.output}
    if [value.name for value in model.graph.input] != ["image"] or "probability" not in outputs:
        raise ArtifactError(f"{path}: an artifact must have the input 'image' and the output 'probability'")
    if "presence" not in outputs and any(rule.presence for rule in artifact.rules):
        raise ArtifactError(f"{path} has no output 'presence', which its rules need: export it again")
