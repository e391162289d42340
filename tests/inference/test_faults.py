"""Full disks, closed pipes, folders that cannot be written, files that change during a run, and refused outputs."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.files import contents, file_size_limit, read_pairs
from support.runs import run, words
from support.tiny import write_jpeg

from cloudrt.cli.infer import infer
from cloudrt.errors import DataError
from cloudrt.inference.journal import Journal
from cloudrt.inference.pipeline import Segmenter

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(16):
        write_jpeg(tmp_path / "in" / f"{number:02}.jpg", number)
    return tmp_path / "in"


COMMAND = [sys.executable, "-c", "from cloudrt.cli import infer; infer()"]


@posix
@pytest.mark.parametrize("limit", [1024, 8192])
def test_a_full_disk_is_one_line_and_the_run_continues_later(
    images: Path, model: Path, tmp_path: Path, limit: int
) -> None:
    """With a limit on the size of files, writes fail as on a full disk: in the journal, or in the final file."""
    output = tmp_path / "out" / "s.csv"
    command = [*COMMAND, *words(images, model, output)]
    with file_size_limit(limit):  # the process inherits it
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr
    assert {path.name for path in output.parent.iterdir()} == {"s.csv.journal"}
    whole = tmp_path / "whole.csv"
    assert run(images, model, whole).exit_code == 0
    again = run(images, model, output, "--resume")
    assert again.exit_code == 0, again.output
    assert output.read_bytes() == whole.read_bytes()


@linux
@pytest.mark.parametrize("output", ["/sys/s.csv", "/dev/null/s.csv", "/proc/self/s.csv"])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(images: Path, model: Path, output: str) -> None:
    done = run(images, model, Path(output))
    assert done.exit_code == 2, done.output
    assert "Segmenting" not in done.output
    assert output.rsplit("/", 1)[0] in done.output.splitlines()[-1]


@posix
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_pipe_leaves_no_half_file(images: Path, model: Path, tmp_path: Path, stream: str) -> None:
    """As with `| head`, which exits early. The output is complete, or its journal is kept, or nothing was written."""
    output = tmp_path / "out" / "s.csv"
    reading, writing = os.pipe()
    os.close(reading)
    other = "stderr" if stream == "stdout" else "stdout"
    pipes = {stream: writing, other: subprocess.PIPE}
    done = subprocess.run([*COMMAND, *words(images, model, output)], **pipes, text=True, check=False)  # type: ignore[call-overload]
    os.close(writing)
    said = done.stderr if stream == "stdout" else done.stdout
    assert done.returncode == 141
    assert "Traceback" not in said and "Exception ignored" not in said
    if stream == "stdout":
        assert said.splitlines()[-1] == "Stopped: the reader of the output closed it"
    left = {path.name for path in output.parent.iterdir()} if output.parent.exists() else set()
    assert left in ({"s.csv", "s.run.json"}, {"s.csv.journal"}, set())
    if "s.csv" in left:
        with output.open(newline="") as file:
            assert len(list(csv.reader(file))) == 1 + 3 * 16


def test_a_folder_that_changes_during_the_run(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first result, a file disappears, another is cut, a third becomes a folder, and a new one is added."""
    real = Journal.add
    changed: list[bool] = []

    def add(self: Journal, record: object) -> None:
        if not changed:
            changed.append(True)
            (images / "15.jpg").unlink()
            (images / "14.jpg").write_bytes((images / "14.jpg").read_bytes()[:500])
            (images / "13.jpg").unlink()
            (images / "13.jpg").mkdir()
            write_jpeg(images / "16.jpg", 16)
        real(self, record)  # type: ignore[arg-type]

    monkeypatch.setattr(Journal, "add", add)
    output = tmp_path / "s.csv"
    done = run(images, model, output, "--batch-size", "1", "--threads", "1")
    assert done.exit_code == 1, done.output
    failures = read_pairs(tmp_path / "s.failures.csv")
    assert set(failures) == {"13.jpg", "14.jpg", "15.jpg"}
    assert "No such file" in failures["15.jpg"]
    assert "16.jpg" not in output.read_text()
    assert len(output.read_text().splitlines()) == 1 + 3 * 16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-o", "a.csv", "--stats", "a.csv"], "it is both --output and --stats"),
        (["-o", "a.csv", "--save-probabilities", "a.csv"], "--save-probabilities"),
        (["-o", "a.csv", "--save-probabilities", "a.npz", "--stats", "a.npz"], "both --stats and --save-probabilities"),
        (["-o", "a.csv", "--stats", "a.csv.journal"], "both --stats and the journal"),
        (["-o", "a.csv", "--stats", "./a.failures.csv"], "both the list of failures and --stats"),
        (["-o", "a.csv", "--stats", "a.html", "--report"], "both the report and --stats"),
        (["-o", "a.csv", "--stats", "a.run.json"], "both the record of the run and --stats"),
        (["-o", "a.csv", "--masks", "m", "--overlays", "m"], "both --masks and --overlays"),
        (["-o", "a.csv", "--masks", "in"], "both input in and --masks"),
        (["-o", "a.csv", "--overlays", ".", "--overwrite"], "contains input images"),
        (["-o", "report.html", "--report"], "the suffix decides the format"),
        (["-o", "model.onnx", "--overwrite"], "the suffix decides the format"),
        (["-o", "to_model.csv", "--overwrite"], "both --model and --output"),
        (["-o", "to_image.csv", "--overwrite"], "is one of the images"),
        (["-o", "a.csv", "--stats", "model.onnx", "--overwrite"], "both --model and --stats"),
        (["-o", "a.csv", "--stats", "in/03.jpg", "--overwrite"], "is one of the images"),
        (["-o", "a.csv", "--stats", "in"], "both input in and --stats"),
        (["-o", "a.csv", "--stats", "folder.npz"], "is not a regular file"),
        (["-o", "a.csv", "--save-probabilities", "folder.npz"], "is not a regular file"),
        (["-o", "a.csv", "--masks", "model.onnx"], "both --model and --masks"),
        (["-o", "a.csv", "--masks", "in/03.jpg"], "is not a folder"),
        (["-o", "a.csv", "--masks", "a.csv/m"], "(--masks) lies below --output a.csv"),
        (
            ["-o", "a.csv", "--masks", "m", "--stats", "m/Fish/03.jpg.png"],
            "03.jpg.png: the file name must end in .json",
        ),
        (["-o", "a.csv", "--devices", ""], "GPU numbers such as 0,1"),
        (["-o", "a.csv", "--devices", "0,0"], "without repetition"),
        (["-o", "a.csv", "--batch-size", "99999999999999999999"], "--batch-size"),
    ],
)
def test_wrong_outputs_and_options_are_refused_and_nothing_is_written(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").write_bytes(model.read_bytes())
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "to_model.csv").symlink_to("model.onnx")
    (tmp_path / "to_image.csv").hardlink_to(images / "03.jpg")
    before = contents(tmp_path)
    done = CliRunner().invoke(infer, ["in", "-m", "model.onnx", "--provider", "cpu", "--batch-size", "4", *options])
    assert done.exit_code == 2, done.output
    assert said in done.output
    assert contents(tmp_path) == before


def test_the_model_in_the_working_folder_is_not_replaced(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").write_bytes(model.read_bytes())
    done = CliRunner().invoke(infer, [str(images), "--stats", "model.onnx", "--overwrite"])
    assert done.exit_code == 2, done.output
    assert "both --model and --stats" in done.output
    assert (tmp_path / "model.onnx").read_bytes() == model.read_bytes()


def test_wrong_inputs_are_refused_at_once_and_items_of_other_types_fail(model: Path) -> None:
    with Segmenter(model, provider="cpu", batch_size=2) as segmenter:
        for one, said in (("a.jpg", "a.jpg is missing"), (Path("no/folder"), "is missing"), (5, "inputs must be")):
            for method in (segmenter.predict, segmenter.infer):
                with pytest.raises(DataError, match=said):
                    method(one)  # type: ignore[arg-type]
        assert [result.error for result in segmenter.predict([None, 3])] == [  # type: ignore[list-item]
            "is of type NoneType, expected a path, bytes or an array",
            "is of type int, expected a path, bytes or an array",
        ]


def test_options_of_wrong_types_or_out_of_range_are_refused(model: Path) -> None:
    for wrong in ({"batch_size": 2.5}, {"threads": "2"}, {"max_pixels": 0}, {"batch_size": 10**9}, {"devices": ()}):
        with pytest.raises(DataError):
            Segmenter(model, provider="cpu", **wrong)
