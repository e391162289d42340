"""Hostile names, closed streams, full disks, unexpected errors and terminal escape sequences on the command line."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from support.files import read_pairs
from support.tiny import SMALL_GRIDS, write_jpeg

from cloudrt.cli.infer import infer
from cloudrt.inference.journal import Journal
from cloudrt.inference.pipeline import Segmenter
from cloudrt.masks.table import read_table
from cloudrt.system.terminal import Failure, log_to_stderr, printable, reports_errors

CLASSES = SMALL_GRIDS.classes
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX")


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        write_jpeg(tmp_path / "in" / f"{number}.jpg", number)
    return tmp_path / "in"


def words(model: Path, *more: str | Path) -> list[str]:
    return ["-m", str(model), "--provider", "cpu", "--batch-size", "2", *map(str, more)]


@posix
def test_names_that_no_file_can_have_fail_alone(images: Path, model: Path, tmp_path: Path) -> None:
    long, longest = "x" * 247 + ".jpg", "y" * 249 + ".jpg"  # with .png, 255 bytes and 257
    unnamed = os.fsencode(images) + b"/\xff\xfe.jpg"
    for name in (os.fsencode(images / long), os.fsencode(images / longest), unnamed):
        Path(os.fsdecode(name)).write_bytes((images / "0.jpg").read_bytes())
    lines = ["in/0.jpg", "in/nul\0.jpg", f"in/{longest}", "in/" + "z" * 300 + ".jpg", f"in/{long}", "in/1.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(lines), encoding="utf-8")
    assert CliRunner().invoke(infer, ["list.txt", *words(model, "-o", "plain.csv")]).exit_code == 1
    done = CliRunner().invoke(infer, ["list.txt", *words(model, "--masks", "masks", "--overlays", "overlays")])
    assert done.exit_code == 1, done.output
    found = read_pairs(tmp_path / "submission.failures.csv")
    assert set(found) == set(lines[1:4])
    assert "null" in found["in/nul\0.jpg"] and "too long" in found[lines[3]]
    assert found[f"in/{longest}"] == "its masks or overlay cannot be written: File name too long"
    rows, plain = ((tmp_path / name).read_text().splitlines() for name in ("submission.csv", "plain.csv"))
    for row, other in zip(rows, plain, strict=True):
        assert row == (f"{other.split(',')[0]}," if other.startswith(f"in/{longest}") else other)
    written = {path.name for path in (tmp_path / "masks" / CLASSES[0] / "in").iterdir()}
    assert written == {"0.jpg.png", "1.jpg.png", f"{long}.png"}
    done = CliRunner().invoke(infer, [os.fsdecode(unnamed), *words(model, "-o", "one.csv", "--masks", "others")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "others" / CLASSES[0] / "\\xff\\xfe.jpg.png").is_file()
    done = CliRunner().invoke(infer, ["in", *words(model, "-o", "all.csv", "--overlays", "all")])
    assert done.exit_code == 1 and set(read_pairs(tmp_path / "all.failures.csv")) == {longest}, done.output


@posix
def test_names_that_spreadsheets_take_for_formulas_are_written_as_they_are(
    images: Path, model: Path, tmp_path: Path
) -> None:
    """Escaped, they would no longer be the keys; SECURITY.md says how to open the tables."""
    names = ["=cmd|' -C calc'!A0.jpg", "+1.jpg", "-x.jpg", "@x.jpg", "\ty.jpg", '=HYPERLINK("x")&A1.jpg']
    for name in names:
        (images / name).write_bytes((images / "0.jpg").read_bytes())
        (images / f"{name[:-4]}-bad.jpg").write_text("not an image")
    done = CliRunner().invoke(infer, ["in", *words(model, "-o", "s.csv")])
    assert done.exit_code == 1, done.output
    assert set(read_pairs(tmp_path / "s.failures.csv")) == {f"{name[:-4]}-bad.jpg" for name in names}
    found = {name for name, _ in read_table(tmp_path / "s.csv", SMALL_GRIDS)}
    assert found == {path.name for path in images.iterdir()}


@pytest.mark.parametrize("pair", [("0.jpg", "./0.jpg"), ("0.jpg", "0.JPG"), ("sub/0.jpg", "sub//0.jpg")])
def test_two_images_never_share_a_mask(images: Path, model: Path, tmp_path: Path, pair: tuple[str, str]) -> None:
    (images / "list.txt").write_text("\n".join(pair))
    done = CliRunner().invoke(infer, ["in/list.txt", *words(model, "--masks", "masks")])
    assert done.exit_code == 2 and "would share a file in the folder of --masks" in done.output
    assert not (tmp_path / "masks").exists() and not (tmp_path / "submission.csv").exists()


@pytest.mark.parametrize(("folder", "option"), [("0.jpg.png", "--masks"), ("0.JPG.jpg", "--overlays")])
def test_no_file_of_an_image_is_the_folder_of_others(
    images: Path, model: Path, tmp_path: Path, folder: str, option: str
) -> None:
    (images / folder).mkdir()
    shutil.copy(images / "0.jpg", images / folder / "x.jpg")
    done = CliRunner().invoke(infer, ["in", *words(model, option, "pictures")])
    assert done.exit_code == 2 and "would have the name of the folder of other images" in done.output
    assert not (tmp_path / "pictures").exists() and not (tmp_path / "submission.csv").exists()


@posix
@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_nothing(images: Path, model: Path, tmp_path: Path, closed: str) -> None:
    """Otherwise the journal could get the file descriptor of stderr, and with it the output of libraries."""
    (images / "bad.jpg").write_text("not an image")
    assert CliRunner().invoke(infer, ["in", *words(model, "-o", "open.csv")]).exit_code == 1
    command = [sys.executable, "-c", "from cloudrt.cli import infer; infer()", "in", *words(model)]
    done = subprocess.run(["bash", "-c", f'exec "$@" {closed}', "bash", *command], check=False)
    assert done.returncode == 1
    assert (tmp_path / "submission.csv").read_bytes() == (tmp_path / "open.csv").read_bytes()
    assert not list(tmp_path.glob("*.journal"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_a_full_stderr_is_status_2(images: Path, model: Path) -> None:
    """Status 1 would mean that the output was written."""
    command = [sys.executable, "-c", "from cloudrt.cli import infer; infer()", "in", *words(model)]
    with Path("/dev/full").open("w") as full:
        assert subprocess.run(command, stdout=full, stderr=full, check=False).returncode == 2
    assert not Path("submission.csv").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_a_full_stdout_for_help_gives_a_one_line_error() -> None:
    command = [sys.executable, "-m", "cloudrt", "score", "--help"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@posix
def test_rows_for_a_closed_stream_are_refused(images: Path, model: Path) -> None:
    command = [sys.executable, "-c", "from cloudrt.cli import infer; infer()", "in", *words(model, "-o", "-")]
    shell = ["bash", "-c", 'exec "$@" >&-', "bash", *command]
    done = subprocess.run(shell, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2 and "writes to standard output, which is closed" in done.stderr


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["journal", "s.csv"])
def test_a_full_disk_names_the_path_that_was_given_and_a_remedy(
    images: Path, model: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    class Full:
        def write(self, _text: object) -> int:
            raise OSError(number, os.strerror(number))

    if where == "journal":
        real = Journal.add

        def add(self: Journal, record: object) -> None:
            with monkeypatch.context() as patch:
                patch.setattr(self, "_file", Full())
                patch.setattr(self, "_end", None)
                real(self, record)  # type: ignore[arg-type]

        monkeypatch.setattr(Journal, "add", add)
    else:
        monkeypatch.setattr("cloudrt.inference.outputs._row", Full().write)
    done = CliRunner().invoke(infer, ["in", *words(model, "-o", "out/s.csv")])
    assert done.exit_code == 2
    path = "out/s.csv.journal" if where == "journal" else "out/s.csv"
    last = done.output.splitlines()[-1]
    assert last.startswith(f"Error: {path}: {os.strerror(number)}: free space") and ".part" not in done.output
    assert [file.name for file in Path("out").iterdir()] == ["s.csv.journal"]


def test_an_unexpected_error_is_one_line_and_status_2(
    images: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a fault\nof two lines")

    monkeypatch.setattr("cloudrt.inference.run.run_task", fail)
    done = CliRunner().invoke(infer, ["in", *words(model)])
    assert done.exit_code == 2
    assert done.output == "Error: unexpected ZeroDivisionError: a fault (-v prints the traceback; please report it)\n"
    done = CliRunner().invoke(infer, ["in", *words(model), "-v"])
    assert done.exit_code == 2
    assert "Traceback (most recent call last)" in done.output and "in fail" in done.output


def test_errors_are_one_line_and_v_adds_the_traceback() -> None:
    @click.command()
    @click.option("--how")
    @reports_errors
    def command(how: str) -> None:
        log_to_stderr("cloudrt", 20)
        if how == "exit":
            logging.getLogger("cloudrt").warning("two\nlines")
            raise SystemExit(1)
        if how == "refuse":
            raise Failure("no \x1b[31mred")
        if how == "module":
            raise ModuleNotFoundError("No module named 'gone'", name="gone")
        raise RecursionError

    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(command, words)
        return done.exit_code, done.output

    assert run("--how", "exit") == (1, "Warning: two\\nlines\n")
    assert run("--how", "refuse") == (2, "Error: no \\x1b[31mred\n")
    assert run("--how", "module")[1].startswith("Error: unexpected ModuleNotFoundError: No module named 'gone' (-v")
    status, said = run("--how", "x", "-v")
    assert status == 2 and said.startswith("Traceback") and said.splitlines()[-1].startswith("Error: unexpected Recurs")


def test_escapes_of_terminals_are_not_printed_raw(images: Path, model: Path) -> None:
    (images / "\x1b]0;title\x07.jpg").write_text("not an image")
    done = CliRunner().invoke(infer, ["in", *words(model, "-o", "-")])
    assert done.exit_code == 1
    assert "\x1b" not in done.stderr and '\\x1b]0;title\\x07.jpg,"is not' in done.stderr
    done = CliRunner().invoke(infer, ["in/\x1bcnone", *words(model)])
    assert done.exit_code == 2 and "\x1b" not in done.stderr and "\\x1bcnone is missing" in done.stderr
    assert printable("é 漢\t\n\u202e\ud800\x9b") == "é 漢\t\n\\u202e\\ud800\\x9b"


def test_a_name_with_a_line_break_makes_one_line(images: Path, model: Path) -> None:
    done = CliRunner().invoke(infer, ["in/a\nb", *words(model)])
    assert done.exit_code == 2 and done.stderr.startswith("Error: in/a\\nb is missing") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["-m", "-o", "--masks", "--overlays", "--sample", "--stats"])
def test_an_empty_path_is_not_the_current_folder(images: Path, model: Path, tmp_path: Path, option: str) -> None:
    """A shell passes an empty path if a quoted variable is not set."""
    before = set(tmp_path.rglob("*"))
    done = CliRunner().invoke(infer, ["in", *words(model, "--overwrite"), option, ""])
    assert done.exit_code == 2 and "is empty: give a path" in done.stderr and option in done.stderr
    assert set(tmp_path.rglob("*")) == before


@posix
def test_a_parquet_file_may_have_a_name_that_is_not_utf_8(images: Path, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    output = os.fsdecode(b"\xff.parquet")
    done = CliRunner().invoke(infer, ["in", *words(model, "-o", output)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / output).read_bytes()[:4] == b"PAR1"


def test_an_artifact_that_cannot_be_tiled_leaves_no_journal(images: Path, model: Path, tmp_path: Path) -> None:
    """Its field of view is not a multiple of its grid."""
    before = set(tmp_path.rglob("*"))
    done = CliRunner().invoke(infer, ["in", *words(model, "--tile", "--report", "--masks", "masks")])
    assert done.exit_code == 2 and "cannot be cut into tiles" in done.stderr
    assert set(tmp_path.rglob("*")) == before


@posix
def test_a_listed_folder_with_a_nul_fails_alone_where_outputs_exist(images: Path, model: Path) -> None:
    (images / "list.txt").write_text("0.jpg\nno\0ne/1.jpg\n")
    for more in ((), ("--overwrite",)):
        done = CliRunner().invoke(infer, ["in/list.txt", *words(model, *more)])
        assert done.exit_code == 1, done.output


def test_rows_on_standard_output_name_no_journal_when_interrupted(
    images: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal was in a temporary folder."""
    real = Segmenter.predict

    def stops(self: Segmenter, inputs: Iterable[object], *more: object) -> Iterator[object]:
        yield from list(real(self, inputs))[:2]  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(Segmenter, "predict", stops)
    done = CliRunner().invoke(infer, ["in", *words(model, "-o", "-")])
    assert done.exit_code == 130
    assert "resume" not in done.stderr and "journal" not in done.stderr and done.stdout == ""
    done = CliRunner().invoke(infer, ["in", *words(model, "-o", "s.csv")])
    assert done.exit_code == 130 and "s.csv.journal contains the finished images" in done.stderr


def test_formats_of_one_name_share_no_file(images: Path, model: Path, tmp_path: Path) -> None:
    (images / "bad.jpg").write_text("not an image")
    for name in ("a.csv", "a.json"):
        assert CliRunner().invoke(infer, ["in", *words(model, "-o", name, "--report")]).exit_code == 1
    own = {"a.csv", "a.failures.csv", "a.html", "a.run.json"}
    other = {"a.json", "a.json.failures.csv", "a.json.html", "a.json.run.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"in"} | own | other
