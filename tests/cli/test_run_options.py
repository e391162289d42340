"""The options of engines on the command line: each reaches the provider that has it, and no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from cloudrt.cli.run_options import run_options, suggested_inputs, take_run_options
from cloudrt.options import CudaOptions, OpenvinoOptions, RunOptions, TensorrtOptions, TensorrtRtxOptions
from cloudrt.system.terminal import reports_errors


def parse(*words: str) -> RunOptions | str:
    """Return the options, or the error that is printed."""
    taken: list[RunOptions] = []

    @click.command()
    @run_options
    @reports_errors
    def command(**given: Any) -> None:
        taken.append(take_run_options(given))
        assert not given

    done = CliRunner().invoke(command, words)
    assert done.exit_code == (0 if taken else 2), done.output
    return taken[0] if taken else done.output


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("", RunOptions()),
        (
            "--provider cuda --streams 2 --channels-last --no-cuda-graph",
            RunOptions(provider="cuda", cuda=CudaOptions(2, False, True)),
        ),
        (
            "--provider cuda --no-channels-last --cuda-graph",
            RunOptions(provider="cuda", cuda=CudaOptions(0, True, False)),
        ),
        (
            "--provider tensorrt --streams 2 --batch-size 16",
            RunOptions(provider="tensorrt", batch_size=16, tensorrt=TensorrtOptions(2)),
        ),
        (
            "--provider tensorrt-rtx --cuda-graph",
            RunOptions(provider="tensorrt-rtx", tensorrt_rtx=TensorrtRtxOptions(graph=True)),
        ),
        ("--provider openvino --streams 3", RunOptions(provider="openvino", openvino=OpenvinoOptions(3))),
    ],
)
def test_options_reach_their_provider(words: str, wanted: RunOptions) -> None:
    assert parse(*words.split()) == wanted
    assert RunOptions.from_dict(wanted.to_dict()) == wanted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--provider tensorrt --channels-last", "--channels-last needs --provider cuda"),
        ("--no-channels-last", "--channels-last needs --provider cuda"),
        ("--provider openvino --cuda-graph", "--cuda-graph needs --provider tensorrt or tensorrt-rtx or cuda"),
        ("--provider tensorrt-rtx --streams 2", "tensorrt-rtx runs one batch at a time: --streams 2 is too many"),
        ("--provider cuda --streams 2 --cuda-graph", "a CUDA graph runs one batch at a time"),
    ],
)
def test_options_of_another_provider_are_refused(words: str, message: str) -> None:
    assert message in str(parse(*words.split()))


@pytest.mark.parametrize("numbers", ["-1", "0,-1", "first", ""])
def test_devices_that_are_not_gpu_numbers_are_refused(numbers: str) -> None:
    assert f"--devices {numbers}: expected GPU numbers such as 0,1" in str(parse("--devices", numbers))


def test_the_next_command_names_a_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("my data/train_images", "bare"):
        Path(folder).mkdir(parents=True)
    assert suggested_inputs(None) == suggested_inputs(Path("my data")) == "FOLDER_OF_IMAGES"
    Path("my data/test_images").mkdir()
    for data in ("my data", "my data/train_images", "my data/test_images"):
        assert suggested_inputs(Path(data)) == "'my data/test_images'"
    assert suggested_inputs(Path("bare")) == suggested_inputs(Path("absent")) == "FOLDER_OF_IMAGES"
