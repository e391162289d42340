"""The file of the journal: any keys and reasons, when records are written, and files that are not journals."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.identity import make_identity

from cloudrt.errors import DataError
from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.inference.journal import Journal
from cloudrt.inference.journal_records import Record


def test_two_runs_do_not_write_one_journal(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with pytest.raises(DataError, match="written by another run"):
        first = Journal(tmp_path / "j", make_identity(), resume=False)
        try:
            Journal(tmp_path / "j", make_identity(), resume=True)
        finally:
            first.close()


def test_a_journal_that_its_run_deletes_meanwhile_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run opens the file just before the first run deletes it, and locks it just after."""
    fcntl = pytest.importorskip("fcntl")
    first = Journal(tmp_path / "j", make_identity())
    lock, ends = fcntl.flock, [first]

    def flock(file: object, kind: int) -> None:
        while ends:
            ends.pop().remove()
        lock(file, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    second = Journal(tmp_path / "j", make_identity())
    with pytest.raises(DataError, match="written by another run"):
        Journal(tmp_path / "j", make_identity())
    second.add(Record("a.jpg", ("1 2",), None, 0))
    assert [record.key for record in second.records()] == ["a.jpg"]
    second.remove()
    assert not list(tmp_path.iterdir())


def test_keys_and_reasons_of_any_kind_come_back(tmp_path: Path) -> None:
    odd = [
        Record('line\nbreak, "quoted" Wölkchen.jpg', ("1 2", ""), None, 0),
        Record("b.jpg", ("", ""), "is no\r\nimage", 0),
    ]
    journal = Journal(tmp_path / "j", make_identity(), resume=False)
    for record in odd:
        journal.add(record)
    assert list(journal.records()) == odd
    journal.close()
    again = Journal(tmp_path / "j", make_identity(), resume=True)
    assert again.done == 0  # the only batch may be incomplete
    again.remove()
    assert not list(tmp_path.iterdir())


def test_records_reach_the_disk_at_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    now = [0.0]
    monkeypatch.setattr("cloudrt.inference.journal.time.monotonic", lambda: now[0])
    journal = Journal(tmp_path / "j", make_identity(), resume=False)
    begun = len(synced)
    assert begun >= 2  # the file and its folder
    for second in range(10):
        now[0] = float(second)
        journal.add(Record(f"{second}.jpg", ("",), None, 0))
    assert 3 <= len(synced) - begun <= 5
    journal.close()


@pytest.mark.parametrize("content", [b"my diary\n", b"0123456x {}", b"\x89PNG\r\n", b"0123456789abcdef"])
def test_another_file_of_that_name_is_kept(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(DataError, match="is not a journal"):
        Journal(tmp_path / "j", make_identity(), resume=True)
    assert (tmp_path / "j").read_bytes() == content


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_a_pipe_is_no_journal(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "j")
    with pytest.raises(DataError, match="is not a regular file"):
        Journal(tmp_path / "j", make_identity(), resume=True)


def test_complete_batches_are_in_the_file_before_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill loses neither one slow batch nor many fast ones."""
    clock = [100.0]
    monkeypatch.setattr("cloudrt.inference.journal.time.monotonic", lambda: clock[0])
    path = tmp_path / "j"
    journal = Journal(path, make_identity(), resume=False)

    def recorded() -> int:
        return path.read_bytes().count(b'"position":')

    for position in range(12):  # batches of 4, one second each
        clock[0] += 1 if position % 4 == 0 else 0
        journal.add(Record(f"{position}.jpg", ("1 1",) * 4, None, position - position % 4, 4))
        assert recorded() >= (position + 1) // 4 * 4
    written = 0
    for position in range(12, 412):  # 10 ms each
        clock[0] += 0.0025
        before = recorded()
        journal.add(Record(f"{position}.jpg", ("1 1",) * 4, None, position - position % 4, 4))
        written += recorded() > before
        assert position + 1 - recorded() <= 4 + 0.05 / 0.0025
    assert written <= 25
    journal.close()


def test_finished_panoramas_are_in_the_file_before_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of 8 consists of tiles, so one panorama may fill it: its record does not wait for seven others."""
    monkeypatch.setattr("cloudrt.inference.journal.FLUSH_SECONDS", 0.0)
    journal = Journal(tmp_path / "j", make_identity())
    sizes = [journal.path.stat().st_size]
    for position in range(3):
        journal.add(Record(f"{position}.tif", ("1 2", ""), None, position, 8, MaskGrid((20, 30))))
        sizes.append(journal.path.stat().st_size)
    assert len(set(sizes)) == 4
    journal.close()


def test_starts_that_are_killed_lose_nothing(tmp_path: Path) -> None:
    """Each is killed before it adds a record. Only the last batch runs again, as on any resume."""
    journal = Journal(tmp_path / "j", make_identity(), resume=False)
    for number in range(12):
        journal.add(Record(f"{number}.jpg", ("",), None, number // 3 * 3, 3))
    journal.close()
    for _ in range(5):
        again = Journal(tmp_path / "j", make_identity(), resume=True)
        assert (again.done, again.size) == (9, 3)
        assert [record.key for record in again.records()] == [f"{number}.jpg" for number in range(9)]
        again.close()
    last = Journal(tmp_path / "j", make_identity(), resume=True)
    last.add(Record("new.jpg", ("",), None, 9, 3))
    assert [record.key for record in last.records()][8:] == ["8.jpg", "new.jpg"]
    last.close()


def test_a_journal_does_not_write_through_links(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("of someone else")
    (tmp_path / "a.journal").symlink_to(other)
    (tmp_path / "b.journal").hardlink_to(other)
    for name, reason in (("a", "not a regular file"), ("b", "a hard link")):
        with pytest.raises(DataError, match=reason):
            Journal(tmp_path / f"{name}.journal", None)
    assert other.read_text() == "of someone else"
