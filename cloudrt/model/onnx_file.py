"""The ONNX file of an artifact: what is checked before its metadata is read, its checksum, and copies of its graph.

ONNX has no checksum, and flipped bits in weights would change masks without an error: `artifact_bytes` adds the SHA-256
of the file as "cloudrt.sha256", and `load_model` compares it.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from cloudrt.errors import ArtifactError
from cloudrt.system.files import is_special
from cloudrt.system.suggest import CHECKPOINTS, nearest_checkpoint

if TYPE_CHECKING:
    import onnx

CHECKSUM = "cloudrt.sha256"
"""Key of the SHA-256 of the file's bytes, with zeros in the place of the digest."""

LARGEST_FILE = 2**31
"""Bytes; protobuf reads no larger message."""


def load_model(path: str | Path) -> onnx.ModelProto:
    """Load an ONNX file; the errors are those of `read_artifact`."""
    return load_with_content(path)[0]


def load_with_content(path: str | Path) -> tuple[onnx.ModelProto, bytes]:
    """Load an ONNX file, and also return the bytes that were read: the file may be replaced later."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        content = _read(Path(path))
        model = onnx.load_model_from_string(content)
    except FileNotFoundError:
        source = nearest_checkpoint(path) or "best.pth, which cloudrt-train writes"
        raise ArtifactError(f"{path} is missing: export one with cloudrt-export {source}") from None
    except (DecodeError, ValueError) as error:
        if Path(path).suffix in CHECKPOINTS:
            raise ArtifactError(f"{path} is a checkpoint: convert it with cloudrt-export {path}") from error
        raise ArtifactError(f"{path} is not an ONNX model, or is damaged") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error
    _check_intact(model, content, path)
    _check_contained(model, path)
    return model, content


def _read(path: Path) -> bytes:
    if is_special(path):
        raise ArtifactError(f"{path} is not a regular file")
    status = path.stat()
    if status.st_size >= LARGEST_FILE:
        raise ArtifactError(f"{path} has {status.st_size:,} bytes; an ONNX file has fewer than {LARGEST_FILE:,}")
    with path.open("rb") as file:
        return file.read(status.st_size)


def artifact_bytes(model: onnx.ModelProto) -> bytes:
    """Add the checksum to the model's metadata, and return the content of its file."""
    kept = [one for one in model.metadata_props if one.key != CHECKSUM]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    entry = model.metadata_props.add(key=CHECKSUM, value=json.dumps("0" * 64))
    entry.value = json.dumps(sha256(model.SerializeToString()).hexdigest())
    content: bytes = model.SerializeToString()
    return content


def _check_intact(model: onnx.ModelProto, content: bytes, path: str | Path) -> None:
    """Compare the file's checksum with its content; files that another tool or an earlier version wrote have none."""
    for value in (one.value for one in model.metadata_props if one.key == CHECKSUM):
        begin = content.rfind(value.encode()) + 1  # after the quote
        rest = memoryview(content)
        digest = sha256(rest[:begin])
        digest.update(b"0" * 64)
        digest.update(rest[begin + 64 :])
        if value != json.dumps(digest.hexdigest()):
            raise ArtifactError(
                f"{path} is damaged, or was changed after cloudrt wrote it: its SHA-256 differs from {CHECKSUM} in its "
                "metadata. Export it again with cloudrt-export, or remove that entry if the change is intended"
            )


def _check_contained(model: onnx.ModelProto, path: str | Path) -> None:
    """Refuse weights in other files, which the file's digest does not cover, and control flow, which may never end."""
    import onnx

    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    attributes = [attribute for node in nodes for attribute in node.attribute]
    if any(attribute.HasField("g") or attribute.graphs for attribute in attributes):
        raise ArtifactError(f"{path} contains control flow (If, Loop or Scan): export it again with cloudrt-export")
    if any(node.op_type == "EPContext" for node in nodes):  # a compiled engine, which may lie in another file
        raise ArtifactError(f"{path} contains a compiled engine: export it again with cloudrt-export")
    values = [*model.graph.sparse_initializer]
    values += [one for attribute in attributes for one in (attribute.sparse_tensor, *attribute.sparse_tensors)]
    tensors = [*model.graph.initializer, *(part for one in values for part in (one.values, one.indices))]
    tensors += [one for attribute in attributes for one in (attribute.t, *attribute.tensors)]
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors):
        raise ArtifactError(f"{path} keeps weights in another file: export it again with cloudrt-export, into one file")


def graph_bytes(model: onnx.ModelProto) -> bytes:
    """Return the serialised model without metadata, which is equal for artifacts that differ only in their rules."""
    from onnx import ModelProto

    bare = ModelProto()
    bare.CopyFrom(model)
    del bare.metadata_props[:]
    content: bytes = bare.SerializeToString()
    return content


def fix_batch(model: onnx.ModelProto, batch_size: int) -> onnx.ModelProto:
    """Return a copy with a fixed N in the shape of the input, which OpenVINO loads faster than a dynamic N."""
    from onnx import ModelProto

    fixed = ModelProto()
    fixed.CopyFrom(model)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch_size
    return fixed
