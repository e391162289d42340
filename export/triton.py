"""Write a model repository for NVIDIA's Triton Inference Server: the artifact, its configuration and its labels.

    DIR/cloudrt/config.pbtxt    DIR/cloudrt/labels.txt    DIR/cloudrt/1/model.onnx

The schema of config.pbtxt is model_config.proto of github.com/triton-inference-server/common.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from cloudrt.engines.remote_metadata import model_parameters
from cloudrt.engines.tensorrt import triton_options
from cloudrt.errors import DataError
from cloudrt.model.artifact import Artifact
from cloudrt.model.onnx_file import load_model
from cloudrt.system.files import replacing, sha256

NAME = "cloudrt"
"""Default name of the model in the repository."""
QUEUE_MICROSECONDS = 5000
"""How long the first request of a batch waits for more."""


def write_repository(
    folder: Path, model: Path, artifact: Artifact, *, name: str = NAME, largest_batch: int = 32
) -> Path:
    """Add an artifact to a Triton model repository; return the folder of the model.

    Parameters
    ----------
    folder
        The repository; other models in it are kept.
    model
        Path of the artifact.
    artifact
        Its metadata.
    name
        Name of the model in the repository: letters, digits, - and _.
    largest_batch
        Maximum batch size; Triton combines requests into batches.

    Raises
    ------
    DataError
        The name is not accepted by Triton.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise DataError(f"the name of a Triton model can only have letters, digits, - and _, found {name!r}")
    copy, labels, config = repository_files(folder, name)
    with replacing(copy) as partial:
        shutil.copyfile(model, partial)
    with replacing(labels) as partial:
        partial.write_text("".join(f"{label}\n" for label in artifact.labels.classes))
    with replacing(config) as partial:
        outputs = [output.name for output in load_model(model).graph.output]
        presence = "presence" in outputs
        partial.write_text(triton_config(artifact, name, largest_batch, sha256(model), presence=presence))
    return folder / name


def repository_files(folder: Path, name: str = NAME) -> tuple[Path, Path, Path]:
    """Return the files that `write_repository` writes: the artifact, its labels and its configuration."""
    root = folder / name
    return root / "1" / "model.onnx", root / "labels.txt", root / "config.pbtxt"


def triton_config(
    artifact: Artifact, name: str, largest_batch: int, digest: str = "", *, presence: bool = False
) -> str:
    """Return the text of config.pbtxt.

    The parameters hold the artifact's metadata, for clients that post-process, such as `cloudrt-infer --remote`;
    `digest` is the SHA-256 of the artifact's file, and `presence` says whether the graph has this output.
    """
    height, width = artifact.input_size
    presence_output = f'  {{ name: "presence" data_type: TYPE_UINT8 dims: [ {len(artifact.labels.classes)} ] }}'
    preferred = sorted({max(1, largest_batch // 4), largest_batch})
    lines = [
        f"name: {_text(name)}",
        'backend: "onnxruntime"',
        f"max_batch_size: {largest_batch}",
        "input [",
        f'  {{ name: "image" data_type: TYPE_UINT8 dims: [ {height}, {width}, 3 ] }}',
        "]",
        "output [",
        f'  {{ name: "probability" data_type: TYPE_UINT8 dims: [ {", ".join(map(str, artifact.output_shape))} ]',
        '    label_filename: "labels.txt" }' + ("," if presence else ""),
        *([presence_output] if presence else []),
        "]",
        "dynamic_batching {",
        f"  preferred_batch_size: [ {', '.join(map(str, preferred))} ]",
        f"  max_queue_delay_microseconds: {QUEUE_MICROSECONDS}",
        "}",
        "instance_group [ { count: 1 kind: KIND_AUTO } ]",
        *_accelerator(artifact, largest_batch),
        *(line for batch in preferred for line in _warm_up(artifact, batch)),
        *(
            f"parameters {{ key: {_text(key)} value {{ string_value: {_text(value)} }} }}"
            for key, value in model_parameters(artifact, digest).items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _accelerator(artifact: Artifact, largest_batch: int) -> list[str]:
    if artifact.int8_target == "cpu":
        return []  # TensorRT has no asymmetric int8
    options = triton_options(artifact, largest_batch)
    return [
        "optimization { execution_accelerators { gpu_execution_accelerator [ {",
        '  name: "tensorrt"',
        *(f"  parameters {{ key: {_text(key)} value: {_text(value)} }}" for key, value in options.items()),
        "} ] } }",
    ]


def _warm_up(artifact: Artifact, batch: int) -> list[str]:
    height, width = artifact.input_size
    return [
        "model_warmup [ {",
        f'  name: "batch of {batch}" batch_size: {batch}',
        '  inputs { key: "image" value {',
        f"    data_type: TYPE_UINT8 dims: [ {height}, {width}, 3 ] random_data: true",
        "  } }",
        "} ]",
    ]


def _text(value: str) -> str:
    """Quote for protobuf's text format. Its escapes are those of JSON, except for \\u."""
    return json.dumps(value, ensure_ascii=False)
