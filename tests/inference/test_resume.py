"""`--resume` refuses changed journals and outputs of other runs by name, and does not repeat finished runs."""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.runs import refused, run, stopped
from support.tiny import write_jpeg

from cloudrt.cli.infer import infer
from cloudrt.inference.journal import FORMAT
from cloudrt.inference.pictures import write_masks
from cloudrt.inference.pipeline import Segmenter

IMAGES = 14


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes, and one file that fails."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(IMAGES - 1):
        write_jpeg(folder / f"{number:02}.jpg", number)
    (folder / "05a.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def unfinished(images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The lines of the journal of a run that was stopped before it wrote the CSV."""
    return stopped(images, model, tmp_path_factory.mktemp("unfinished") / "s.csv").splitlines(keepends=True)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Name -> content and time of modification of every file in a folder."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}


def drop(lines: list[bytes], place: int) -> list[bytes]:
    return lines[:place] + lines[place + 1 :]


def duplicate(lines: list[bytes], place: int) -> list[bytes]:
    return lines[: place + 1] + lines[place:]


def swap(lines: list[bytes], place: int) -> list[bytes]:
    return [*lines[:place], lines[place + 1], lines[place], *lines[place + 2 :]]


def rewritten(line: bytes, **values: object) -> bytes:
    """A record with other values and their checksum."""
    text = json.dumps(json.loads(line[9:]) | values).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


@pytest.mark.parametrize("change", [drop, duplicate, swap])
@pytest.mark.parametrize("place", [1, 4, 7, 9, IMAGES - 1])
def test_records_out_of_order_are_refused_by_name(
    images: Path,
    model: Path,
    unfinished: list[bytes],
    tmp_path: Path,
    change: Callable[[list[bytes], int], list[bytes]],
    place: int,
) -> None:
    """Every line keeps its checksum. Line 0 is the header, line `place` the record of image `place` - 1."""
    content = b"".join(change(unfinished, place))
    (tmp_path / "s.csv.journal").write_bytes(content)
    line = refused(run(images, model, tmp_path / "s.csv", "--resume"))
    first = place if change is duplicate else place - 1
    assert f"s.csv.journal record {first}: found image" in line
    assert "use --overwrite to start again" in line
    assert {name: found for name, (found, _) in snapshot(tmp_path).items()} == {"s.csv.journal": content}
    assert run(images, model, tmp_path / "s.csv", "--overwrite").exit_code == 1


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"key": "07.jpg"}, r"record 5: found image 5 (07.jpg), expected 5 (05.jpg)"),
        ({"batch": 0}, "record 5"),
        ({"batch": 3}, "record 5"),
        ({"texts": None}, "record 5: malformed"),
        ({"position": 6}, "record 5: found image 6"),
    ],
)
def test_a_record_that_was_edited_never_gives_wrong_rows(
    images: Path, model: Path, unfinished: list[bytes], tmp_path: Path, values: dict[str, object], named: str
) -> None:
    """The record of image 5, whose batch begins at 4, with its checksum made right again."""
    lines = [*unfinished[:6], rewritten(unfinished[6], **values), *unfinished[7:]]
    (tmp_path / "s.csv.journal").write_bytes(b"".join(lines))
    assert named in refused(run(images, model, tmp_path / "s.csv", "--resume"))
    assert set(snapshot(tmp_path)) == {"s.csv.journal"}


def test_a_journal_with_more_images_than_the_run_is_refused(
    images: Path, model: Path, unfinished: list[bytes], tmp_path: Path
) -> None:
    more = rewritten(unfinished[-1], position=IMAGES, key="99.jpg")
    (tmp_path / "s.csv.journal").write_bytes(b"".join([*unfinished, more]))
    line = refused(run(images, model, tmp_path / "s.csv", "--resume"))
    assert f"record {IMAGES}: found image {IMAGES} (99.jpg), expected" in line


def test_a_journal_of_another_format_is_refused_by_name(images: Path, model: Path, tmp_path: Path) -> None:
    """The header as format 2 wrote it, with spaces in the keys of the identity."""
    text = b'{"format":2,"identity":{"artifact":"ab","batch size":4}}'
    content = b"%08x %s\n" % (zlib.crc32(text), text)
    (tmp_path / "s.csv.journal").write_bytes(content)
    line = refused(run(images, model, tmp_path / "s.csv", "--resume"))
    assert "s.csv.journal is a journal of format 2, written by another version of cloudrt" in line
    assert f"(this one writes format {FORMAT})" in line
    assert "--overwrite" in line
    assert (tmp_path / "s.csv.journal").read_bytes() == content
    assert run(images, model, tmp_path / "s.csv", "--overwrite").exit_code == 1


@pytest.mark.parametrize("header", [{"identity": None}, {"identity": {"artifact": "ab"}}, {}])
def test_a_journal_without_a_whole_identity_is_refused(
    images: Path, model: Path, tmp_path: Path, header: dict[str, object]
) -> None:
    (tmp_path / "s.csv.journal").write_bytes(rewritten(b"00000000 {}", format=FORMAT, **header))
    assert "--overwrite" in refused(run(images, model, tmp_path / "s.csv", "--resume"))
    assert set(snapshot(tmp_path)) == {"s.csv.journal"}


def test_a_finished_run_is_left_alone(images: Path, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "s.csv"
    more = ["--report", "--stats", str(tmp_path / "stats.json"), "--masks", str(tmp_path / "masks")]
    assert run(images, model, output, *more).exit_code == 1
    before = snapshot(tmp_path)
    assert set(before) == {"s.csv", "s.failures.csv", "s.html", "s.run.json", "stats.json"}
    again = run(images, model, output, *more, "--resume")
    assert again.exit_code == 0, again.output
    assert "s.csv: already finished, nothing to do" in again.output
    assert "Segmenting" not in again.output
    # Neither batch size nor provider need be repeated: the record holds them.
    assert CliRunner().invoke(infer, [str(images), "-m", str(model), "-o", str(output), "--resume"]).exit_code == 0
    assert snapshot(tmp_path) == before


def test_a_run_that_is_stopped_while_it_writes_the_report_gets_one_later(
    images: Path, model: Path, tmp_path: Path
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cloudrt.reports.submission_page.Report.write", stop)
        assert run(images, model, tmp_path / "s.csv", "--report").exit_code == 130
    assert run(images, model, tmp_path / "s.csv", "--report", "--resume").exit_code == 1
    assert set(snapshot(tmp_path)) == {"s.csv", "s.failures.csv", "s.html", "s.run.json"}


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--batch-size", "3"], "batch_size was 4, now 3"),
        (["--threads", "1"], "threads was"),
        (["--max-megapixels", "5"], "max_pixels was 100000000, now 5000000"),
    ],
)
def test_the_output_of_another_run_is_refused(
    images: Path, model: Path, tmp_path: Path, more: list[str], named: str
) -> None:
    output = tmp_path / "s.csv"
    assert run(images, model, output).exit_code == 1
    before = snapshot(tmp_path)
    line = refused(run(images, model, output, "--resume", *more))
    assert "s.csv belongs to another run: " in line
    assert named in line
    write_jpeg(tmp_path / "others" / "00.jpg", 40)
    assert "images was" in refused(run(tmp_path / "others", model, output, "--resume"))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("s.csv", "s.csv exists without s.run.json, the record of its run"),
        ("s.failures.csv", "s.failures.csv exists"),
        ("s.html", "s.html exists"),
        ("s.run.json", "s.run.json exists"),
    ],
)
def test_a_file_that_no_run_wrote_is_not_replaced_by_resume(
    images: Path, model: Path, tmp_path: Path, name: str, said: str
) -> None:
    (tmp_path / name).write_text("somebody's own")
    before = snapshot(tmp_path)
    line = refused(run(images, model, tmp_path / "s.csv", "--resume", "--report"))
    assert said in line and "--overwrite" in line
    assert snapshot(tmp_path) == before


def test_an_output_that_was_changed_after_its_run_is_refused(images: Path, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "s.csv"
    assert run(images, model, output).exit_code == 1
    output.write_bytes(output.read_bytes() + b"99.jpg_Fish,\n")
    before = snapshot(tmp_path)
    assert "s.csv was changed after the run that wrote it" in refused(run(images, model, output, "--resume"))
    for damaged in ("", "{}", "[", '{"format": 1, "identity": {}, "output_sha256": ""}', '{"format": 99}'):
        (tmp_path / "s.run.json").write_text(damaged)
        line = refused(run(images, model, output, "--resume"))
        assert "s.run.json" in line
    assert snapshot(tmp_path)["s.csv"] == before["s.csv"]
    assert run(images, model, output, "--overwrite").exit_code == 1


def test_an_unfinished_run_replaces_what_it_was_allowed_to_overwrite(images: Path, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "s.csv"
    assert run(images, model, tmp_path / "whole.csv").exit_code == 1
    output.write_text("of long ago")
    stopped(images, model, output, "--overwrite")
    assert output.read_text() == "of long ago"
    assert run(images, model, output, "--resume").exit_code == 1
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_two_runs_in_one_folder_never_touch_each_others_files(images: Path, model: Path, tmp_path: Path) -> None:
    """One has failures and a report; the other has none, is stopped, resumed, and run again."""
    sound = tmp_path / "sound"
    for number in range(6):
        write_jpeg(sound / f"{number}.jpg", number)
    folder = tmp_path / "out"
    assert run(images, model, folder / "a.csv", "--report").exit_code == 1
    first = snapshot(folder)
    assert set(first) == {"a.csv", "a.failures.csv", "a.html", "a.run.json"}
    stopped(sound, model, folder / "b.csv")
    assert set(snapshot(folder)) == {*first, "b.csv.journal"}
    assert run(sound, model, folder / "b.csv", "--resume", "--report").exit_code == 0
    assert set(snapshot(folder)) == {*first, "b.csv", "b.html", "b.run.json"}
    assert run(sound, model, folder / "b.csv", "--overwrite").exit_code == 0
    assert {name: found for name, found in snapshot(folder).items() if name in first} == first
    second = {name: found for name, found in snapshot(folder).items() if name not in first}
    assert run(images, model, folder / "a.csv", "--overwrite").exit_code == 1
    assert {name: found for name, found in snapshot(folder).items() if name in second} == second


@pytest.mark.parametrize("ends", [True, False], ids=["finished", "stopped"])
@pytest.mark.parametrize("option", [[], ["--resume"]])
def test_a_run_that_another_one_overtakes_replaces_nothing(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: bool, option: list[str]
) -> None:
    """A second run, on other images, uses the same output while the first one still opens its model."""
    write_jpeg(tmp_path / "other" / "a.jpg", 1)
    folder, more = tmp_path / "out", ["--masks", str(tmp_path / "masks")]
    output, found = folder / "s.csv", dict[str, tuple[bytes, int]]()

    class Slow(Segmenter):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            monkeypatch.undo()
            (run if ends else stopped)(tmp_path / "other", model, output, *more)
            found.update(snapshot(folder))

    monkeypatch.setattr("cloudrt.inference.run.Segmenter", Slow)
    refused(run(images, model, output, *more, *option))
    assert found == snapshot(folder)
    assert set(found) == ({"s.csv", "s.run.json"} if ends else {"s.csv.journal"})
    assert [path.name for path in (tmp_path / "masks" / "Fish").iterdir()] == ["a.jpg.png"]


def test_a_resumed_run_refuses_other_streams_by_name(images: Path, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    output = tmp_path / "s.csv"
    openvino = ["--provider", "openvino", "--streams"]
    stopped(images, model, output, *openvino, "1")
    assert "streams was 1, now 2" in refused(run(images, model, output, "--resume", *openvino, "2"))
    assert run(images, model, output, "--resume", *openvino, "1").exit_code == 1


def test_pictures_of_finished_images_are_written_in_paint_threads(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, folders = tmp_path / "s.csv", ("--masks", str(tmp_path / "masks"), "--overlays", str(tmp_path / "overlays"))
    stopped(images, model, output)
    threads: dict[str, str] = {}
    write = write_masks

    def note(folder: Path, key: str, *more: Any) -> None:
        threads[key] = threading.current_thread().name
        write(folder, key, *more)

    monkeypatch.setattr("cloudrt.inference.paint.write_masks", note)
    done = run(images, model, output, "--resume", *folders)
    assert done.exit_code == 1 and "12 images are finished" in done.output, done.output
    assert len(threads) == IMAGES and all(name.startswith("paint") for name in threads.values()), threads
    assert len(list((tmp_path / "masks" / "Fish").iterdir())) == IMAGES
    assert len(list((tmp_path / "overlays").iterdir())) == IMAGES - 1
