"""Foreign, cut, changed and malicious checkpoints: refused in one line, and never executed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from cloudrt.cli.export import export
from cloudrt.errors import ArtifactError
from cloudrt.masks.rule import Rule
from cloudrt.model.checkpoint import Checkpoint


class Malicious:
    """An object of a malicious checkpoint: unpickling it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return os.mkdir, (str(self.path),)


def saved(checkpoint: Path) -> dict[str, Any]:
    values: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    return values


def test_a_malicious_checkpoint_does_not_run(checkpoint: Path, tmp_path: Path) -> None:
    witness, path = tmp_path / "executed", tmp_path / "evil.pth"
    for values in (Malicious(witness), saved(checkpoint) | {"training": {"seed": Malicious(witness)}}):
        torch.save(values, path)
        with pytest.raises(ArtifactError, match=r"evil\.pth is not a checkpoint, or is damaged"):
            Checkpoint.load(path)
        assert not witness.exists()
    torch.load(path, weights_only=False)
    assert witness.is_dir()  # it would have run


def test_a_missing_checkpoint_suggests_the_one_beside_it(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"best\.pt is missing: train one with cloudrt-train"):
        Checkpoint.load(tmp_path / "best.pt")
    (tmp_path / "best.pth").touch()
    for name in ("best.pt", "other.ckpt"):
        with pytest.raises(ArtifactError, match=rf"{name} is missing: did you mean {tmp_path / 'best.pth'}\?"):
            Checkpoint.load(tmp_path / name)


def test_checkpoints_that_are_cut_or_of_another_format(checkpoint: Path, tmp_path: Path) -> None:
    content = checkpoint.read_bytes()
    path = tmp_path / "x.pth"
    cut = [content[:size] for size in (0, 1, 100, len(content) // 2, len(content) - 1)]
    for damaged in (b"not a checkpoint", *cut):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="not a checkpoint, or is damaged"):
            Checkpoint.load(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ArtifactError, match="was not written by"):
        Checkpoint.load(path)
    for change, said in (
        ({"format": 99}, "has a format that this version cannot read"),
        ({"weights": [1]}, "was not written by"),
        ({"config": {}}, "was not written by this version"),
        ({"rules": [{"threshold": 300, "min_area": 0}]}, "was not written by this version"),
        ({"surprise": 1}, "was not written by this version"),
    ):
        torch.save(saved(checkpoint) | change, path)
        with pytest.raises(ArtifactError, match=said):
            Checkpoint.load(path)


def test_flipped_bits_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    """PyTorch would read weights with flipped bits without an error, and they are almost the whole file."""
    content = checkpoint.read_bytes()
    path = tmp_path / "flipped.pth"
    for place in range(len(content) // 8, len(content), len(content) // 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        with pytest.raises(ArtifactError, match="is not a checkpoint, or is damaged"):
            Checkpoint.load(path)
    assert Checkpoint.load(checkpoint).weights


def test_weights_that_do_not_fit_are_named(checkpoint: Path, tmp_path: Path) -> None:
    name = "encoder.conv1.weight"

    def refused(change: Callable[[dict[str, torch.Tensor]], object], said: str) -> None:
        values = saved(checkpoint)
        change(values["weights"])
        torch.save(values, tmp_path / "x.pth")
        with pytest.raises(ArtifactError, match=said) as caught:
            Checkpoint.load(tmp_path / "x.pth").network()
        assert "\n" not in str(caught.value)

    refused(lambda weights: weights.pop(name), f"{name} is missing$")
    refused(lambda weights: weights.clear(), r"is missing \(\d+ such errors\)")
    refused(lambda weights: weights.update(extra=torch.zeros(1)), "extra is unexpected")
    refused(lambda weights: weights.update({name: weights[name] > 0}), f"{name} is torch.bool, expected torch.float32")
    refused(lambda weights: weights.update({name: weights[name] * 1j}), f"{name} is torch.complex64")
    refused(lambda weights: weights.update({name: torch.zeros(2, 3)}), rf"{name} is \(2, 3\), expected \(64, 3, 7, 7\)")
    for bad in (float("nan"), float("inf")):

        def spoil(weights: dict[str, torch.Tensor], bad: float = bad) -> None:
            weights[name].view(-1)[5] = bad

        refused(spoil, f"{name} contains NaN or infinity")


def test_the_command_refuses_in_one_line_and_leaves_the_older_artifact(checkpoint: Path, tmp_path: Path) -> None:
    values = saved(checkpoint)
    values["weights"]["encoder.conv1.weight"].fill_(float("nan"))
    torch.save(values, tmp_path / "nan.pth")
    torch.save(Malicious(tmp_path / "executed"), tmp_path / "evil.pth")
    (tmp_path / "cut.pth").write_bytes(checkpoint.read_bytes()[:1000])
    (tmp_path / "model.onnx").write_text("older")
    before = sorted(path.name for path in tmp_path.iterdir())
    for name, said in (("nan", "NaN or infinity"), ("evil", "damaged"), ("cut", "damaged")):
        result = CliRunner().invoke(export, [str(tmp_path / f"{name}.pth"), "--overwrite"])
        assert result.exit_code == 2
        assert said in result.stderr
        assert result.stderr.strip().splitlines()[:-1] == ["Loading PyTorch ..."]
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "model.onnx").read_text() == "older"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rules": [Rule(127, 0).to_dict()] * 2}, "2 rules for 4 classes"),
        ({"dice": float("nan")}, "Dice nan is not a number"),
        ({"dice": "x"}, "Dice 'x' is not a number"),
        ({"epoch": "x"}, "epoch 'x'"),
        ({"history": 3}, "history is not a list"),
        ({"training": 3}, "training is not a dictionary"),
        ({"weights_license": 3}, "licence is not a string"),
        ({"weights": {"a": 1}}, "weights are not tensors"),
    ],
)
def test_checkpoints_with_wrong_values(checkpoint: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    torch.save(saved(checkpoint) | change, tmp_path / "x.pth")
    with pytest.raises(ArtifactError, match=said):
        Checkpoint.load(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input_size": [64, 96, 3]}, "height, width"),
        ({"input_size": [64.0, 96.0]}, "two integers"),
        ({"input_size": "64x96"}, "height, width"),
        ({"input_size": [320000, 640000]}, "more than 16 megapixels"),
        ({"options": None}, "options a dictionary"),
        ({"architecture": 3}, "must be names"),
        ({"mean": [1.0]}, "mean must be one finite number per channel"),
        ({"mean": [float("nan")] * 3}, "mean must be one finite number"),
        ({"std": [0.0] * 3}, "std must be above 0"),
        ({"std": ["a"] * 3}, "std must be one finite number"),
        ({"subtract_no_data": "no"}, "subtract_no_data must be True or False"),
        ({"presence": "top-k", "top_k": "9"}, "top_k must be from 1 to"),
    ],
)
def test_network_configurations_with_wrong_values(
    checkpoint: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    values = saved(checkpoint)
    torch.save(values | {"config": values["config"] | change}, tmp_path / "x.pth")
    with pytest.raises(ArtifactError, match=said):
        Checkpoint.load(tmp_path / "x.pth")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(ArtifactError, match="is not a checkpoint"):
        Checkpoint.load(tmp_path / "pipe.pth")
