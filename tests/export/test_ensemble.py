"""Several networks and flips in one artifact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner
from cloudrt.export.ensemble import Ensemble
from cloudrt.export.export import Target, export
from cloudrt.export.source import ExportSource, SourceOptions
from scipy.special import expit, logit
from support.networks import make_checkpoint, probability

from cloudrt.cli.export import export as command
from cloudrt.data.scenes import draw_scene
from cloudrt.errors import DataError, ParityError
from cloudrt.labels import Labels
from cloudrt.model.artifact import read_artifact
from cloudrt.model.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with another encoder and another normalisation."""
    path = tmp_path_factory.mktemp("second") / "best.pth"
    make_checkpoint(path, "tu-regnety_002", seed=1, mean=(100.0, 110.0, 90.0), subtract_no_data=False)
    return path


FLIPS: dict[str, list[tuple[bool, bool]]] = {
    "none": [(False, False)],
    "h": [(False, False), (False, True)],
    "v": [(False, False), (True, False)],
    "hv": [(False, False), (False, True), (True, False), (True, True)],
}


@pytest.mark.parametrize(
    ("members", "tta"),
    [
        (1, "h"),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((1, "v"), (1, "hv"), (2, "none"))),
        (2, "hv"),
    ],
)
def test_flips_and_members_are_averaged_in_the_graph(
    checkpoint: Path, second: Path, tmp_path: Path, tta: str, members: int
) -> None:
    paths = [checkpoint, second][:members]
    done = export(ExportSource(paths, SourceOptions(tta=tta, max_images=16)), tmp_path / "m.onnx", Target("fp32"))
    images = np.stack([draw_scene(seed, (64, 96)).image for seed in range(3)])
    each = []  # the probability of each member, from the mean logits of its views
    for path in paths:
        logits = []
        for up_down, left_right in FLIPS[tta]:
            flipped = images[:, :: -1 if up_down else 1, :: -1 if left_right else 1].copy()
            logits.append(logit(probability(path, flipped)[:, :, :: -1 if up_down else 1, :: -1 if left_right else 1]))
        each.append(expit(np.mean(logits, axis=0)))
    wanted = np.rint(np.mean(each, axis=0) * 255).transpose(0, 1, 3, 2)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"image": images})
    assert np.abs(found - wanted).max() <= 1
    assert done.networks_per_image == members * len(FLIPS[tta])
    said = read_artifact(tmp_path / "m.onnx")
    assert said.tta == tta
    assert [member["encoder"] for member in said.members] == (["resnet18", "tu-regnety_002"] if members == 2 else [])


def test_one_checkpoint_is_no_ensemble(checkpoint: Path) -> None:
    assert Ensemble((Checkpoint.load(checkpoint),)).describe() == []


def test_a_graph_that_lacks_the_flips_is_refused(checkpoint: Path, source: ExportSource, tmp_path: Path) -> None:
    flipped = ExportSource(checkpoint, SourceOptions(tta="hv"))
    flipped.run_pytorch()
    flipped.model = source.model
    with pytest.raises(ParityError, match="would change the submission"):
        export(flipped, tmp_path / "m.onnx", Target("fp32"))
    assert not list(tmp_path.iterdir())


def test_members_must_go_together(checkpoint: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "large.pth", input_size=(96, 96))
    with pytest.raises(DataError, match="need the same input size"):
        ExportSource([checkpoint, tmp_path / "large.pth"])
    make_checkpoint(tmp_path / "other.pth", rules=False, labels=Labels(("A", "B")))
    with pytest.raises(DataError, match="need the same labels"):
        ExportSource([checkpoint, tmp_path / "other.pth"])
    with pytest.raises(DataError, match="tta must be one of"):
        ExportSource(checkpoint, SourceOptions(tta="diagonal"))


def test_command_of_an_ensemble(checkpoint: Path, second: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    words = [str(checkpoint), str(second), "-o", str(out), "--precision", "fp32", "--tta", "hv"]
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 0, done.output
    assert "8 networks run for each image" in done.output
    assert read_artifact(out).tta == "hv"
