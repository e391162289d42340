"""The golden files: format 1 of artifacts, checkpoints and probabilities is read, format 2 of journals is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.identity import make_identity
from support.paths import GOLDEN

from cloudrt.engines.choice import open_engine
from cloudrt.errors import DataError
from cloudrt.inference.journal import Journal, read_identity
from cloudrt.labels import Labels
from cloudrt.masks.rule import Rule
from cloudrt.model.artifact import Artifact, read_artifact
from cloudrt.model.checkpoint import Checkpoint
from cloudrt.model.network import InferenceGraph
from cloudrt.search.probabilities import Probabilities

LABELS = Labels(("Fish", "Sugar"), (64, 96), (32, 48), "Image_Label")
RULES = (
    Rule(threshold=120, min_area=30, gate_threshold=200, gate_pixels=10, presence=64),
    Rule(threshold=127, min_area=0, gate_threshold=255, gate_pixels=0, presence=0),
)


def test_the_metadata_of_an_artifact() -> None:
    assert read_artifact(GOLDEN / "artifact.v1.onnx") == Artifact(
        labels=LABELS,
        input_size=(32, 64),
        mean=(1.0, 2.0, 3.0),
        std=(4.0, 5.0, 6.0),
        rules=RULES,
        architecture="FPN",
        encoder="resnet18",
        options={"decoder_pyramid_channels": 16},
        precision="fp16",
        kept_fp32=("segmentation_head.0",),
        int8_target="",
        subtract_no_data=True,
        checkpoint_sha256="ab" * 32,
        validation_dice=0.625,
        parity={"dice": 0.9975, "images": 16},
        versions={"torch": "2.11.0"},
        weights_license="CC BY 4.0",
        tta="h",
        members=[{"encoder": "resnet18", "dice": 0.625}],
        tuning={"images": 9},
    )


def test_an_artifact_answers() -> None:
    """The image has level 100 and the cuts are 60 and 130: logits of (100 - 60) / 8 = 5 and (100 - 130) / 8 = -3.75."""
    image = np.full((1, 32, 64, 3), 100, np.uint8)
    with open_engine(GOLDEN / "artifact.v1.onnx", "cpu", 1) as engine:
        probability, presence = engine.run(image)
    assert probability.shape == (1, 2, 48, 32)
    assert probability[0, :, 24, 16].tolist() == [253, 6]
    assert presence is not None
    assert presence[0, 0] == 255


def test_a_checkpoint() -> None:
    found = Checkpoint.load(GOLDEN / "checkpoint.v1.pth")
    config = found.config
    assert (config.architecture, config.encoder) == ("FPN", "resnet18")
    assert config.options == {"decoder_pyramid_channels": 8, "decoder_segmentation_channels": 32}
    assert config.input_size == (32, 64)
    assert (config.mean, config.std) == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert (config.subtract_no_data, config.presence, config.top_k) == (True, "top-k", 7)
    assert config.labels == LABELS
    assert found.rules == RULES
    assert (found.dice, found.epoch, found.weights_license) == (0.625, 3, "CC BY 4.0")
    assert found.history == [{"epoch": 1.0, "dice": 0.5}, {"epoch": 2.0, "dice": 0.625}]
    assert found.training == {"seed": 142}


def test_the_network_of_a_checkpoint_answers() -> None:
    """The last layer has zero weights, so that its biases, 1 and -2, are the logits; the right half has no data."""
    found = Checkpoint.load(GOLDEN / "checkpoint.v1.pth")
    image = torch.full((1, 32, 64, 3), 100, dtype=torch.uint8)
    image[:, :, 32:] = 0
    with torch.inference_mode():
        probability, presence = InferenceGraph(found.network(), found.config).eval()(image)
    assert probability.shape == (1, 2, 48, 32)
    assert probability[0, :, 12, 16].tolist() == [186, 30]
    assert probability[0, :, 36, 16].tolist() == [0, 0]
    assert presence[0].tolist() == [186, 30]


def test_probabilities() -> None:
    with Probabilities(GOLDEN / "probabilities.v1.npz") as found:
        assert found.labels == Labels(("Fish", "Sugar"), (4, 6), (2, 3), "Image_Label")
        assert found.keys == ["a.jpg", "sub/b.jpg"]
        levels, presence = found.read("a.jpg")
        assert levels.tolist() == [[[0, 21], [42, 63], [84, 105]], [[126, 147], [168, 189], [210, 231]]]
        assert presence is not None
        assert presence.tolist() == [210, 5]
        levels, presence = found.read("sub/b.jpg")
        assert levels.tolist() == [[[255, 255]] * 3] * 2
        assert presence is None


def test_a_journal_is_refused_by_name(tmp_path: Path) -> None:
    """It stays as it is, for the version that wrote it."""
    path = Path(shutil.copy(GOLDEN / "journal.v2", tmp_path / "submission.csv.journal"))
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"submission\.csv\.journal is a journal of format 2, .* version") as caught:
        read_identity(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"submission\.csv\.journal is a journal of format 2, .* version"):
        Journal(path, make_identity(), resume=True)
    assert path.read_bytes() == before
