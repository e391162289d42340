"""The user's cache: bounded in size, checked for damage, and unused if it cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.paths import ROOT

from cloudrt.system import cache
from cloudrt.system.cache import SEAL, cache_folder, mark_used, open_entry, prune, remove_damaged, seal


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(cache.LIMITS, "plans", 1000)
    return tmp_path / "cloudrt" / "plans"


def fill(folder: Path, name: str, size: int, used: int, *, file: bool = False) -> Path:
    """Make an entry of `size` bytes that was used at `used`, in seconds."""
    entry = folder / name
    content = entry if file else entry / "below" / "content"
    content.parent.mkdir(parents=True, exist_ok=True)
    content.write_bytes(bytes(size))
    os.utime(entry, (used, used))
    return entry


def test_the_least_recently_used_entries_go_first(folder: Path) -> None:
    assert cache_folder("plans") == folder
    old, middle, new = (fill(folder, name, 400, used) for name, used in (("c", 10), ("a", 20), ("b", 30)))
    mark_used(old)
    entry = open_entry("plans", "d")
    assert entry is not None and sorted(folder.iterdir()) == sorted([old, new, entry])
    assert not middle.exists()


def test_an_entry_that_exists_removes_nothing(folder: Path) -> None:
    entries = [fill(folder, name, 900, 10) for name in "ab"]
    assert open_entry("plans", "a") == entries[0]
    assert sorted(folder.iterdir()) == entries
    assert entries[0].stat().st_mtime > entries[1].stat().st_mtime


def test_room_is_made_for_what_is_about_to_be_written(folder: Path) -> None:
    first, second = fill(folder, "a", 300, 10), fill(folder, "b", 300, 20)
    prune("plans")
    assert first.exists()
    prune("plans", reserve=500)
    assert not first.exists() and second.exists()
    prune("plans", reserve=5000, keep=second)
    assert second.exists()
    prune("plans", reserve=5000)
    assert not second.exists()


def test_entries_may_be_files_and_hidden_ones_are_kept(folder: Path) -> None:
    old, hidden = fill(folder, "old.json", 600, 10, file=True), fill(folder, ".x.1.part", 600, 5, file=True)
    new = fill(folder, "new.json", 600, 20, file=True)
    prune("plans")
    assert sorted(folder.iterdir()) == sorted([hidden, new])
    assert not old.exists()


def test_another_folder_may_be_named(tmp_path: Path, folder: Path) -> None:
    assert open_entry("plans", "a", tmp_path / "elsewhere") == tmp_path / "elsewhere" / "a"
    assert not folder.exists()


@pytest.mark.parametrize("name", ["/dev/null", "~/.cache"], ids=["no folder", "no home"])
def test_nothing_is_cached_where_nothing_can_be_written(name: str, folder: Path) -> None:
    assert open_entry("plans", "a", Path(name)) is None
    prune("plans", Path(name))
    assert not Path(name, "a").exists()


def test_what_is_damaged_or_unsealed_is_removed(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("sound", "flipped", "unsealed", "cut")]
    for file in files:
        file.write_bytes(b"machine code")
    sound, flipped, _, cut = files
    seal([sound, flipped, cut])
    flipped.write_bytes(b"machine cod\xff")
    cut.write_bytes(b"")
    remove_damaged(files)
    assert sorted(tmp_path.iterdir()) == [sound, sound.with_name("sound" + SEAL)]
    sound.with_name("sound" + SEAL).write_bytes(b"\xff")
    remove_damaged([sound])
    assert not list(tmp_path.iterdir())


def test_the_documented_limits_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "reference" / "files.md").read_text(encoding="utf-8")
    section = text.partition("## Caches")[2].partition("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("| `")]
    units = {"MiB": 2**20, "GiB": 2**30}
    found: dict[str, int] = {}
    for line in table:
        names, _, limits = (cell.strip() for cell in line.strip("|").split("|"))
        *sizes, unit = limits.replace(",", "").replace("and ", "").split()
        for name, size in zip(names.split(", "), sizes, strict=True):
            found[name.strip("`/")] = int(size) * units[unit]
    assert found == cache.LIMITS
