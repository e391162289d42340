"""Messages about common mistakes, which say what to do instead; and shell completion."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from support.paths import ROOT, setup_entry_points
from support.tiny import tiny_artifact

import cloudrt
from cloudrt.cli import main

PROGRAMS = Path(sys.executable).parent


def fill(*folders: str) -> None:
    """Make folders in the working folder, each with a black image."""
    for folder in folders:
        Path(folder).mkdir(parents=True)
        cv2.imwrite(f"{folder}/a.png", np.zeros((20, 30, 3), np.uint8))


def refused(*words: str | Path) -> str:
    """Return the message of a command that exits with status 2, on one line."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["predict", "in"], "no command 'predict'; did you mean infer?"),
        (["inefr", "in"], "no command 'inefr'; did you mean infer?"),
        (["xyzzy"], "no command 'xyzzy'; the commands are train, export, infer"),
        (
            ["infer", "in", "--device", "cuda:1"],
            "no option --device: use --provider, such as --provider cuda, or --devices 0 for GPU 0",
        ),
        (["infer", "in", "--reprot"], "--report"),
        (["infer", "in", "-m", "best.pth"], "best.pth is a checkpoint: convert it with cloudrt-export best.pth"),
        (["explore", "train.csv"], "train.csv is a file: give the folder that contains train.csv and train_images"),
        (["tune", "best.pth", "."], "best.pth is a checkpoint"),
        (["infer", "in", "-m", "in/m.pt"], "in/m.pt is missing: export one with cloudrt-export in/m.pth"),
        (
            ["infer", "in", "-m", "in/model.onnx"],
            "in/model.onnx is missing: export one with cloudrt-export in/best",
        ),
        (["tune", "in/m.ckpt", "."], "in/m.ckpt is missing: export one with cloudrt-export in/m.pth"),
        (["doctor", "in/best.ckpt"], "in/best.ckpt is missing: export one with cloudrt-export in/best.pth"),
        (["infer", "best.pth", "in"], "best.pth is a model, not an image: name it with --model"),
        (["tune", ".", "m.onnx"], "the arguments are swapped: cloudrt tune m.onnx ."),
        (["tune", "in/train.csv", "p.npz"], "the arguments are swapped: cloudrt tune p.npz in"),
        (
            ["tune", "train.csv", "."],
            "train.csv is a table: first give a model (.onnx) or probabilities (.npz)",
        ),
        (["tune", "in", "train.csv"], "in is a folder: first give a model"),
        (["tune", "m.onnx", "train.csv"], "train.csv is a file: give the folder that contains train.csv"),
        (["bench", "-o", "."], "--output .: the file name must end in .json"),
        (["bench", "-o", "in/b.html"], "--output in/b.html: the file name must end in .json"),
        (["tune", "m.onnx", "in"], "in has no train.csv: give the folder that contains train.csv, ."),
    ],
)
def test_mistakes_are_answered_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    fill("in")
    Path("train_images").mkdir()
    Path("train.csv").write_text("Image_Label,EncodedPixels\n")
    for name in ("in/best.pth", "in/m.pth"):
        Path(name).touch()
    Path("best.pth").write_bytes(b"PK\x03\x04 a checkpoint")
    assert said in refused(*words)


@pytest.mark.parametrize(
    ("settings", "python", "words", "command"),
    [
        (
            {"resume": True, "overwrite": True},
            "`resume` and `overwrite` exclude each other",
            "--resume --overwrite",
            "--resume and --overwrite exclude each other",
        ),
        (
            {"provider": "cpu", "compute_precision": "bf16"},
            "`compute_precision='bf16'` applies to `provider='openvino'`;",
            "--provider cpu --compute-precision bf16",
            "--compute-precision bf16 applies to --provider openvino;",
        ),
        (
            {"format": "coco"},
            "`output=s.csv` and `format='coco'`: the suffix decides",
            "--format coco",
            "--output s.csv and --format coco: the suffix decides",
        ),
        ({"overlap": 0.5}, "it needs `tile=True`, or a `format`", "--overlap 0.5", "it needs --tile, or a --format"),
        ({"masks": "full"}, "another `masks`, or `overwrite=True`", "--masks full", "another --masks, or --overwrite"),
        ({"stats": "m.onnx"}, "both `model` and `stats`;", "--stats m.onnx", "both --model and --stats;"),
    ],
)
def test_messages_name_parameters_in_python_and_options_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Any, python: str, words: str, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_artifact(Path("m.onnx"), (64, 96))
    fill("in", "full")
    with pytest.raises(cloudrt.DataError) as caught:
        cloudrt.infer("in", "s.csv", "m.onnx", **settings)
    assert python in str(caught.value) and "--" not in str(caught.value)
    assert command in refused("infer", "in", "-o", "s.csv", "-m", "m.onnx", *words.split())


def test_a_cluster_without_ray_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill("in")
    for name in ("ray", "pyarrow"):  # both are in the extra `ray`; if only pyarrow is missing, `parquet` is named
        monkeypatch.setitem(sys.modules, name, None)
    assert "ray is not installed: pip install '.[ray]' in the checkout" in refused("infer", "in", "--cluster")


def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cloudrt.engines.plan.nvidia_driver", lambda: None)
    fill("in")
    assert "GPU 0" in refused("infer", "in", "--devices", "0")


def test_inputs_are_checked_before_outputs_and_both_before_a_model_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cloudrt.inference.model_source.make_plan", lambda *_: pytest.fail("a model was opened"))
    tiny_artifact(Path("m.onnx"), (64, 96))
    fill("in", "data/train_images")
    Path("data/train.csv").write_text("Image_Label,EncodedPixels\na.png_Fish,1 1\n")
    Path("names.txt").write_text("b.png\n")
    for name in ("s.csv", "t.onnx"):
        Path(name).touch()
    assert "nowhere is missing" in refused("infer", "nowhere", "-m", "m.onnx", "-o", "s.csv")
    assert "no.onnx is missing" in refused("infer", "in", "-m", "no.onnx", "-o", "s.csv")
    assert "s.csv exists" in refused("infer", "in", "-m", "m.onnx", "-o", "s.csv")
    assert "no.onnx is missing" in refused("tune", "no.onnx", "data", "-o", "t.onnx")
    assert "no row of b.png" in refused("tune", "m.onnx", "data", "-o", "t.onnx", "--image-list", "names.txt")
    assert "t.onnx exists" in refused("tune", "m.onnx", "data", "-o", "t.onnx")


def test_a_float_tiff_is_named_and_opencv_is_silent(tmp_path: Path) -> None:
    model = tiny_artifact(tmp_path / "m.onnx", (64, 96))
    (tmp_path / "in").mkdir()
    _, content = cv2.imencode(".tif", np.zeros((40, 60, 3), np.float32))
    (tmp_path / "in" / "a.tif").write_bytes(content.tobytes())
    words = ["infer", "in", "-m", str(model), "-o", "s.csv", "--provider", "cpu", "--batch-size", "1"]
    script = "import sys; from cloudrt.cli import main; main(sys.argv[1:])"
    environment = {name: value for name, value in os.environ.items() if name != "OPENCV_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "OpenCV" not in done.stderr and "WARN" not in done.stderr
    assert "8 or 16 bits per channel, not floating-point" in (tmp_path / "s.failures.csv").read_text()


def complete(shell: str, line: str, tmp_path: Path) -> list[str]:
    """Return the completions that a shell offers for a line."""
    environment = {**os.environ, "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}
    program, *_ = words = line.split(" ")
    name = program.replace("-", "_")
    if shell == "bash":
        script = (
            f'eval "$(_{name.upper()}_COMPLETE=bash_source {program})"\n'
            f"COMP_WORDS=({line}''); COMP_CWORD={len(words) - 1}\n"
            f"_{name}_completion {program}\n"
            'printf "%s\\n" "${COMPREPLY[@]}"\n'
        )
        done = subprocess.run(
            ["bash", "--norc", "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        return done.stdout.split()
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), f"_{name.upper()}_COMPLETE": "zsh_complete"}
    done = subprocess.run(
        [str(PROGRAMS / program)], env=environment | asked, capture_output=True, text=True, check=True
    )
    return done.stdout.split("\n")[1::3]  # kind, value, help


@pytest.mark.skipif(
    not shutil.which("bash") or not (PROGRAMS / "cloudrt").exists(), reason="needs bash and the commands"
)
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_complete_commands_and_options(shell: str, tmp_path: Path) -> None:
    assert complete(shell, "cloudrt in", tmp_path) == ["infer"]
    assert complete(shell, "cloudrt infer --rep", tmp_path) == ["--report", "--report-images"]
    assert complete(shell, "cloudrt-infer --provider ope", tmp_path) == ["openvino"]


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
def test_zsh_takes_the_script(tmp_path: Path) -> None:
    script = (
        'autoload -Uz compinit; compinit -u; eval "$(_CLOUDRT_COMPLETE=zsh_source cloudrt)"\nprint $_comps[cloudrt]'
    )
    environment = {**os.environ, "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}
    done = subprocess.run(["zsh", "-f", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "_cloudrt_completion"


def test_the_docs_name_every_completion() -> None:
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    for name in setup_entry_points():
        assert f'eval "$(_{name.replace("-", "_").upper()}_COMPLETE=bash_source {name})"' in page
    assert "zsh_source" in page
