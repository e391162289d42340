"""Class names, grids and colours."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.tiny import tiny_model

from cloudrt.data.folder import read_labels
from cloudrt.errors import ArtifactError, DataError
from cloudrt.labels import CLOUDS, MAX_NAME_BYTES, Labels, class_colours
from cloudrt.model.artifact import read_artifact

UNSAFE = ["/tmp/x", "../../x", "..", ".", "a\\b", "a\x1b[31m", "a\nb", "a\0", "\ud800", "\u2028", "☁" * 34]


@pytest.mark.parametrize("name", [*UNSAFE, "", "a,b", "a_b", 'a"b', "x" * (MAX_NAME_BYTES + 1), 3])
def test_a_class_name_that_is_no_safe_file_name_is_refused(name: object) -> None:
    with pytest.raises(DataError, match="class name"):
        Labels(("Fish", name))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["Dog ☁", "<b>&", "dog's", "x" * MAX_NAME_BYTES, ".hidden", "a\u200db"])
def test_other_names_are_accepted(name: str) -> None:
    labels = Labels((name,))
    assert Labels.from_dict(json.loads(json.dumps(labels.to_dict()))) == labels


@pytest.mark.parametrize("name", UNSAFE)
def test_names_are_checked_where_data_and_artifacts_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps({"classes": [name]}))
    with pytest.raises(DataError, match="class name"):
        read_labels(tmp_path)
    model = tiny_model()
    next(entry for entry in model.metadata_props if entry.key == "cloudrt.classes").value = json.dumps([name])
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="class name"):
        read_artifact(tmp_path / "model.onnx")


@pytest.mark.parametrize("column", ["", "two words", 3])
def test_a_key_column_that_is_no_name_is_refused(column: object) -> None:
    with pytest.raises(DataError, match="key_column must be a name"):
        Labels.from_dict({"key_column": column})


def test_labels_with_a_key_column_round_trip_through_json() -> None:
    labels = Labels.from_dict({"key_column": "ImageId_ClassId"})
    assert Labels.from_dict(json.loads(json.dumps(labels.to_dict()))) == labels
    assert "key_column" not in Labels().to_dict()


def test_colours_are_distinct() -> None:
    assert class_colours(4) == ["#e69f00", "#56b4e9", "#ee7abf", "#2bd4a0"]
    many = class_colours(40)
    assert len(set(many)) == 40 and all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in many)


@pytest.mark.parametrize("grid", [5, "35", (5,), (5, 0), (5, 2.0), (5, 2**31)])
def test_a_grid_is_two_integers(grid: object) -> None:
    with pytest.raises(DataError, match=r"a grid must be \(height, width\)"):
        Labels(label_grid=grid)  # type: ignore[arg-type]


def test_blocks_of_the_label_grid() -> None:
    assert CLOUDS.block == (4, 4)
