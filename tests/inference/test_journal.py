"""The journal: a run that is resumed after a kill or a power failure writes the bytes of an uninterrupted run."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.runs import run, stopped, words
from support.tiny import SMALL_GRIDS, tiny_artifact, write_jpeg

from cloudrt.cli.infer import infer
from cloudrt.engines.onnxruntime import OrtEngine

IMAGES = 30
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes, and three files that fail."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(IMAGES - 3):
        write_jpeg(folder / f"scene-{number:02}.jpg", number)
    for name in ("scene-03a.jpg", "scene-03b.jpg", "scene-11a.jpg"):
        (folder / name).write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def whole(images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Submission and failures of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(images, model, folder / "s.csv").exit_code == 1
    return (folder / "s.csv").read_bytes(), (folder / "s.failures.csv").read_bytes()


STOPS = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs and their children ignore it
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
from cloudrt.inference.journal import Journal
real, left = Journal.add, [int(sys.argv.pop(1))]
def stop(self, record):
    real(self, record)
    left[0] -= 1
    if left[0] == 0:
        self._file.flush()
        print("stopped", flush=True)
        for _ in range(6000):  # a signal just before a sleep is handled after it
            time.sleep(0.1)
Journal.add = stop
from cloudrt.cli import infer
infer()
"""
"""The command; it pauses after the number of images in its first argument, to be killed there."""


def start(command: list[str], images: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", STOPS, str(images), *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "stopped\n"
    return process


@posix
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    images: Path, model: Path, whole: tuple[bytes, bytes], tmp_path: Path
) -> None:
    """kill -9 after random numbers of images; each run resumes the one before."""
    output = tmp_path / "s.csv"
    draw = random.Random(4)
    for _ in range(5):
        process = start(words(images, model, output, "--resume"), draw.randint(2, 6))
        process.kill()
        process.communicate()
        assert [path.name for path in tmp_path.iterdir()] == ["s.csv.journal"]
    resumed = run(images, model, output, "--resume")
    assert resumed.exit_code == 1, resumed.output
    assert "images are finished, continuing" in resumed.output
    assert (output.read_bytes(), (tmp_path / "s.failures.csv").read_bytes()) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.csv", "s.failures.csv", "s.run.json"]


@pytest.fixture(scope="module")
def finished_journal(images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The journal of a run that was interrupted just before it wrote the CSV."""
    content = stopped(images, model, tmp_path_factory.mktemp("finished") / "s.csv")
    assert content.count(b"\n") == IMAGES + 1
    return content


def cuts(content: bytes) -> Iterator[bytes]:
    """What a power failure may leave: a file cut anywhere, a tail of zeros or noise, a flipped bit."""
    draw = random.Random(7)
    for _ in range(12):
        end = draw.randrange(len(content))
        yield content[:end]
        yield content[:end] + bytes(draw.randrange(1, 5000))
        yield content[:end] + draw.randbytes(draw.randrange(1, 300))
        yield content[:end] + bytes([content[end] ^ 1 << draw.randrange(8)]) + content[end + 1 :]
    yield b""
    yield content


def test_a_torn_journal_gives_the_same_bytes(
    images: Path, model: Path, whole: tuple[bytes, bytes], finished_journal: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "s.csv"
    for number, content in enumerate(cuts(finished_journal)):
        output.unlink(missing_ok=True)
        output.with_name("s.csv.journal").write_bytes(content)
        resumed = run(images, model, output, "--resume")
        assert resumed.exit_code == 1, (number, resumed.output)
        assert (output.read_bytes(), (tmp_path / "s.failures.csv").read_bytes()) == whole, number


def test_batches_are_those_of_an_uninterrupted_run(
    images: Path, model: Path, finished_journal: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any interruption, the engine gets the same batches."""
    seen: list[int] = []
    real = OrtEngine.run

    def look(self: OrtEngine, batch: object) -> object:
        seen.append(zlib.crc32(batch.tobytes()))  # type: ignore[attr-defined]
        return real(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(OrtEngine, "run", look)
    run(images, model, tmp_path / "whole.csv")
    batches = list(seen)
    lines = finished_journal.splitlines(keepends=True)
    for kept in (3, 5, 8, 14, 21, IMAGES):
        seen.clear()
        (tmp_path / "s.csv.journal").write_bytes(b"".join(lines[: 1 + kept]))
        run(images, model, tmp_path / "s.csv", "--resume")
        (tmp_path / "s.csv").unlink()
        assert 0 < len(seen) <= len(batches)
        assert seen == batches[-len(seen) :], kept


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--batch-size", "3"], "batch_size was 4, now 3"),
        (["--threads", "1"], "threads was"),
        (["--max-megapixels", "5"], "max_pixels was 100000000, now 5000000"),
    ],
)
def test_other_options_are_refused_by_name(
    images: Path, model: Path, finished_journal: bytes, tmp_path: Path, more: list[str], named: str
) -> None:
    (tmp_path / "s.csv.journal").write_bytes(finished_journal)
    result = run(images, model, tmp_path / "s.csv", "--resume", *more)
    assert result.exit_code == 2
    assert named in result.output
    assert (tmp_path / "s.csv.journal").read_bytes() == finished_journal


def test_another_artifact_and_other_images_are_refused(
    images: Path, model: Path, finished_journal: bytes, tmp_path: Path
) -> None:
    (tmp_path / "s.csv.journal").write_bytes(finished_journal)
    other = tiny_artifact(tmp_path / "other.onnx", (64, 96), SMALL_GRIDS, checkpoint_sha256="ff" * 32)
    result = run(images, other, tmp_path / "s.csv", "--resume")
    assert result.exit_code == 2
    assert "artifact was" in result.output
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for number in range(5):
        write_jpeg(fewer / f"{number}.jpg", number)
    result = run(fewer, model, tmp_path / "s.csv", "--resume")
    assert result.exit_code == 2
    assert f"images was {IMAGES}, now 5" in result.output


def test_existing_files_need_an_option(images: Path, model: Path, finished_journal: bytes, tmp_path: Path) -> None:
    output = tmp_path / "s.csv"
    output.with_name("s.csv.journal").write_bytes(finished_journal)
    refused = run(images, model, output)
    assert refused.exit_code == 2
    assert "belongs to an interrupted run: use --resume or --overwrite" in refused.output
    assert "give one of them" in run(images, model, output, "--resume", "--overwrite").output
    assert run(images, model, output, "--overwrite").exit_code == 1
    assert "exists: give another --output, or --overwrite" in run(images, model, output).output


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_is_one_line_and_leaves_the_journal(
    images: Path, model: Path, whole: tuple[bytes, bytes], tmp_path: Path, name: str
) -> None:
    output, number = tmp_path / "s.csv", signal.Signals[name]
    process = start(words(images, model, output), 12)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == (143 if name == "SIGHUP" else 128 + number)
    assert "Traceback" not in stderr
    assert "s.csv.journal contains the finished images; --resume continues from there" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["s.csv.journal"]
    assert run(images, model, output, "--resume").exit_code == 1
    assert (output.read_bytes(), (tmp_path / "s.failures.csv").read_bytes()) == whole


def test_the_report_of_a_resumed_run_shows_every_image(
    images: Path, model: Path, finished_journal: bytes, tmp_path: Path
) -> None:
    lines = finished_journal.splitlines(keepends=True)
    (tmp_path / "s.csv.journal").write_bytes(b"".join(lines[:20]))
    result = run(images, model, tmp_path / "s.csv", "--resume", "--report", "--report-images", str(IMAGES))
    assert result.exit_code == 1, result.output
    assert f"{IMAGES} images" in result.output
    assert run(images, model, tmp_path / "t.csv").exit_code == 1
    assert (tmp_path / "s.csv").read_bytes() == (tmp_path / "t.csv").read_bytes()
    page = (tmp_path / "s.html").read_text(encoding="utf-8")
    assert all(path.name in page for path in images.iterdir())


def test_a_resumed_run_uses_the_plan_of_the_first(images: Path, model: Path, tmp_path: Path) -> None:
    """`auto` is not resolved again; requested options that differ are named."""
    pytest.importorskip("openvino")
    output = tmp_path / "s.csv"
    openvino = ["--provider", "openvino", "--batch-size", "3"]
    stopped(images, model, output, *openvino)
    refused = run(images, model, output, "--resume", "--batch-size", "3")
    assert refused.exit_code == 2
    assert "provider was openvino, now cpu" in refused.output
    resumed = CliRunner().invoke(infer, [str(images), "-m", str(model), "-o", str(output), "--resume"])
    assert resumed.exit_code == 1, resumed.output
    assert "provider openvino, batch 3" in resumed.output
    assert "images are finished, continuing" in resumed.output
    assert run(images, model, tmp_path / "whole.csv", *openvino).exit_code == 1
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_an_image_of_another_size_is_another_run(
    images: Path, model: Path, finished_journal: bytes, tmp_path: Path
) -> None:
    shutil.copytree(images, tmp_path / "in")
    (tmp_path / "s.csv.journal").write_bytes(finished_journal)
    with (tmp_path / "in" / "scene-05.jpg").open("ab") as file:
        file.write(b"\0")
    result = run(tmp_path / "in", model, tmp_path / "s.csv", "--resume")
    assert result.exit_code == 2
    assert "inputs was" in result.output


def test_pictures_of_what_was_finished_before_are_written_too(
    images: Path, model: Path, finished_journal: bytes, tmp_path: Path
) -> None:
    lines = finished_journal.splitlines(keepends=True)
    (tmp_path / "s.csv.journal").write_bytes(b"".join(lines[:20]))
    assert run(images, model, tmp_path / "s.csv", "--resume", "--masks", str(tmp_path / "m")).exit_code == 1
    assert run(images, model, tmp_path / "t.csv", "--masks", str(tmp_path / "n")).exit_code == 1
    ours, theirs = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*.png")}
        for root in (tmp_path / "m", tmp_path / "n")
    )
    assert ours == theirs and len(ours) >= 3 * (IMAGES - 3)
