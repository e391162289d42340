"""A tiny artifact, made without torch: the model of most tests of the steps after export.

Its network is one convolution. Class k covers the pixels whose mean brightness over 5x5 pixels is above cut[k]:

    image (N, H, W, 3) uint8 -> (brightness - cut[k]) / 8 -> resize -> sigmoid -> (N, C, W_out, H_out) uint8
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cloudrt.data.scenes import draw_scene
from cloudrt.images.image import ImageFile
from cloudrt.labels import CLOUDS, LABEL_GRID, Grid, Labels
from cloudrt.masks.rule import Rule
from cloudrt.model.artifact import Artifact, write_metadata

SMALL_GRIDS = Labels(("Fish", "Flower", "Gravel"), (120, 180), (60, 90))
"""Labels other than the clouds', on grids that are quick to compute."""


def tiny_model(
    input_size: Grid = (64, 96),
    labels: Labels = CLOUDS,
    *,
    precision: str = "fp32",
    presence: bool = False,
    rules: tuple[Rule, ...] | None = None,
    checkpoint_sha256: str = "",
    field_of_view: Grid = LABEL_GRID,
) -> onnx.ModelProto:
    """Return a valid artifact whose rules give masks on the scenes of `draw_scene`.

    Parameters
    ----------
    precision
        "fp32" or "fp16": the type in which the convolution is computed.
    presence
        Whether it has the `presence` output: 4 times the mean level of the class, at most 255.
    rules
        One per class; by default, threshold 127 and components of more than a thousandth of the grid.
    """
    height, width = input_size
    grid_height, grid_width = labels.submit_grid
    classes = len(labels.classes)
    kind, dtype = {"fp32": (TensorProto.FLOAT, np.float32), "fp16": (TensorProto.FLOAT16, np.float16)}[precision]
    cuts = np.linspace(60, 130, classes)
    weights = np.full((classes, 3, 5, 5), 1 / (3 * 25 * 8))
    constants = {
        "weights": weights.astype(dtype),
        "bias": (-cuts / 8).astype(dtype),
        "sizes": np.array([grid_height, grid_width], np.int64),
        "full": np.array(255, np.float32),
        "share": np.array(4 / (grid_height * grid_width), np.float32),
        "sides": np.array([2, 3], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["levels"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["levels"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["planes"], ["entry"], to=kind),
        helper.make_node("Conv", ["entry", "weights", "bias"], ["inside"], kernel_shape=[5, 5], pads=[2, 2, 2, 2]),
        helper.make_node("Cast", ["inside"], ["logits"], to=TensorProto.FLOAT),
        # The sizes of Resize: N and C of the logits, height and width of the grid.
        helper.make_node("Shape", ["logits"], ["leading"], start=0, end=2),
        helper.make_node("Concat", ["leading", "sizes"], ["resized"], axis=0),
        helper.make_node(
            "Resize",
            ["logits", "", "", "resized"],
            ["large"],
            mode="linear",
            coordinate_transformation_mode="half_pixel",
        ),
        helper.make_node("Sigmoid", ["large"], ["chance"]),
        helper.make_node("Mul", ["chance", "full"], ["scaled"]),
        helper.make_node("Round", ["scaled"], ["rounded"]),
        helper.make_node("Transpose", ["rounded"], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("Cast", ["turned"], ["probability"], to=TensorProto.UINT8),
    ]
    outputs = [helper.make_tensor_value_info("probability", TensorProto.UINT8, ["N", classes, grid_width, grid_height])]
    if presence:
        nodes += [
            helper.make_node("ReduceSum", ["rounded", "sides"], ["sums"], keepdims=0),
            helper.make_node("Mul", ["sums", "share"], ["quadruple"]),
            helper.make_node("Min", ["quadruple", "full"], ["bounded"]),
            helper.make_node("Cast", ["bounded"], ["presence"], to=TensorProto.UINT8),
        ]
        outputs.append(helper.make_tensor_value_info("presence", TensorProto.UINT8, ["N", classes]))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", height, width, 3])],
        outputs,
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    artifact = Artifact(
        labels=labels,
        input_size=input_size,
        rules=(Rule(127, grid_height * grid_width // 1000),) * classes if rules is None else rules,
        architecture="Tiny",
        encoder="none",
        precision=precision,
        checkpoint_sha256=checkpoint_sha256,
        validation_dice=0.5,
        field_of_view=field_of_view,
    )
    write_metadata(model, artifact)
    return model


def tiny_artifact(
    path: Path,
    input_size: Grid = (64, 96),
    labels: Labels = CLOUDS,
    *,
    precision: str = "fp32",
    presence: bool = False,
    rules: tuple[Rule, ...] | None = None,
    checkpoint_sha256: str = "",
    field_of_view: Grid = LABEL_GRID,
) -> Path:
    """Write `tiny_model` to `path`, and return the path."""
    model = tiny_model(
        input_size,
        labels,
        precision=precision,
        presence=presence,
        rules=rules,
        checkpoint_sha256=checkpoint_sha256,
        field_of_view=field_of_view,
    )
    path.write_bytes(model.SerializeToString())
    return path


def write_jpeg(path: Path, seed: int, size: Grid = (140, 210)) -> ImageFile:
    """Write the scene of `seed` as a JPEG, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sound, encoded = cv2.imencode(".jpg", cv2.cvtColor(draw_scene(seed, size).image, cv2.COLOR_RGB2BGR))
    assert sound
    path.write_bytes(encoded.tobytes())
    return ImageFile(path.name, path)


def write_jpegs(folder: Path, count: int) -> Path:
    """Write the scenes of the seeds 0, 1, ... as 00.jpg, 01.jpg, ...; return the folder."""
    for seed in range(count):
        write_jpeg(folder / f"{seed:02}.jpg", seed)
    return folder
