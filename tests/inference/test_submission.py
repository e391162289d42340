"""The CSV of a submission: rows and failures, and files that appear whole or not at all."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from cloudrt.errors import DataError
from cloudrt.inference.submission import RunPaths, open_submission
from cloudrt.labels import CLOUDS, Labels
from cloudrt.masks.table import read_table

LABELS = Labels(("Fish", "Flower"), (8, 8), (4, 4))
RLE = {"Fish": "1 2", "Flower": ""}


def test_rows_and_failures(tmp_path: Path) -> None:
    path = tmp_path / "new" / "submission.csv"
    with open_submission(path, LABELS) as submission:
        submission.add("a.jpg", RLE, None)
        submission.add("sub folder/ä, b.jpg", {"Fish": "", "Flower": ""}, 'is a "damaged" JPEG,\nreally')
        assert not path.exists()
    assert (submission.images, submission.failed, submission.rows_with_mask) == (2, 1, 1)
    assert path.read_bytes().startswith(b"Image_Label,EncodedPixels\na.jpg_Fish,1 2\na.jpg_Flower,\n")
    assert list(read_table(path, LABELS)) == [
        ("a.jpg", "Fish"),
        ("a.jpg", "Flower"),
        ("sub folder/ä, b.jpg", "Fish"),
        ("sub folder/ä, b.jpg", "Flower"),
    ]
    with (path.parent / "submission.failures.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [
            ["image", "reason"],
            ["sub folder/ä, b.jpg", 'is a "damaged" JPEG,\nreally'],
        ]
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["submission.csv", "submission.failures.csv"]


def test_old_failures_go_when_nothing_failed(tmp_path: Path) -> None:
    (tmp_path / "submission.failures.csv").write_text("of an earlier run")
    with open_submission(tmp_path / "submission.csv", LABELS) as submission:
        submission.add("a.jpg", RLE, None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["submission.csv"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, DataError("the input's own")])
def test_nothing_half_written(tmp_path: Path, stop: BaseException | type[BaseException]) -> None:
    """On any error, Ctrl-C included, what was there stays."""
    path = tmp_path / "submission.csv"
    path.write_text("old")
    (tmp_path / "submission.failures.csv").write_text("old failures")

    def run() -> None:
        with open_submission(path, LABELS) as submission:
            submission.add("a.jpg", RLE, "broken")
            raise stop

    with pytest.raises(stop if isinstance(stop, type) else type(stop)):
        run()
    assert path.read_text() == "old"
    assert (tmp_path / "submission.failures.csv").read_text() == "old failures"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["submission.csv", "a.b.parquet", "failures.csv", "s.failures.csv", "s.run.json"])
def test_the_files_of_a_run_are_five(tmp_path: Path, name: str) -> None:
    """The submission, failures, report, record and journal are different files, whatever the submission is called."""
    paths = RunPaths(tmp_path / name)
    files = {paths.output, paths.failures, paths.report, paths.record, paths.journal}
    assert len(files) == 5
    assert {path.parent for path in files} == {tmp_path}


def test_an_empty_submission_has_its_header(tmp_path: Path) -> None:
    with open_submission(tmp_path / "s.csv", LABELS):
        pass
    assert read_table(tmp_path / "s.csv", CLOUDS) == {}
