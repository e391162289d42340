"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest
from support.files import file_size_limit

from cloudrt.errors import DataError
from cloudrt.system import files
from cloudrt.system.files import locked, naming, partial_path, remove_leftovers, replacing, replacing_folder, reserve


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "out.bin"
    with replacing(path) as partial:
        assert partial.parent == path.parent  # a rename is atomic only within one file system
        partial.write_bytes(b"half")
        assert not path.exists()
        with partial.open("ab") as file:
            file.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert names(path.parent) == ["out.bin"]


def test_an_old_file_is_replaced_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    with replacing(str(path)) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_folder_is_replaced_at_the_end(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    (real / "old").touch()
    link.symlink_to(real)
    with replacing_folder(link) as partial:
        assert partial.parent == tmp_path
        partial.mkdir()
        (partial / "new").touch()
        assert names(real) == ["old"]
    assert names(real) == ["new"] and link.is_symlink()
    with replacing_folder(tmp_path / "fresh") as partial:
        partial.mkdir()
    with replacing_folder(real):  # no new folder: the old one is removed
        pass
    assert names(tmp_path) == ["fresh", "link"]


@pytest.mark.parametrize("where", ["inside", "at the end"])
def test_an_error_leaves_the_old_folder(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "old").touch()
    rename = Path.rename

    def full(source: Path, target: Path) -> Path:
        if source == partial_path(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space left") as raised, replacing_folder(path) as partial:
        partial.mkdir()
        (partial / "half").touch()
        if where == "inside":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert raised.value.filename == str(path)
    assert names(tmp_path) == ["out"] and names(path) == ["old"]


@pytest.mark.parametrize("name", ["out", "o" * 200])
@pytest.mark.parametrize("renames", [1, 2])
def test_a_kill_while_folders_are_renamed_leaves_the_old_or_the_new_one(
    tmp_path: Path, renames: int, name: str
) -> None:
    path = tmp_path / name
    path.mkdir()
    (path / "old").touch()
    program = f"""
import os, pathlib, signal
from cloudrt.system.files import replacing_folder
rename, left = pathlib.Path.rename, [{renames}]
def killed_after(source, target):
    rename(source, target)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.rename = killed_after
with replacing_folder({str(path)!r}) as partial:
    partial.mkdir()
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert path.exists() == (renames == 2)
    remove_leftovers(tmp_path)
    [kept] = tmp_path.iterdir()
    assert names(kept) == (["old"] if renames == 1 else [])
    assert kept == path or (renames == 1 and len(name) > 120 and re.fullmatch("o{100}~[0-9a-f]{16}", kept.name))


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_any_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["out.txt"]


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "out.txt"):
        pass
    assert names(tmp_path) == []


def test_a_folder_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    with pytest.raises(DataError), replacing(tmp_path / "out") as partial:
        partial.write_text("new")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["kept"]


def test_content_is_flushed_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that survives a power cut."""
    path = tmp_path / "out.txt"
    seen: list[tuple[str, bool]] = []
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        seen.append((kind, path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    with replacing(path) as partial:
        partial.write_text("new")
    assert seen == [("file", False), ("folder", True)]


def test_what_is_no_regular_file_is_never_replaced(tmp_path: Path) -> None:
    pipe, folder, link = tmp_path / "pipe", tmp_path / "folder", tmp_path / "link"
    os.mkfifo(pipe)
    folder.mkdir()
    link.symlink_to("/dev/null")
    for path in (pipe, folder, link, Path("/dev/null")):
        with pytest.raises(DataError, match="is not a regular file"), replacing(path) as partial:
            partial.write_text("never")
    assert names(tmp_path) == ["folder", "link", "pipe"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert link.is_symlink()


def test_a_link_stays_and_the_file_that_it_names_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("old")
    link = tmp_path / "link.txt"
    link.symlink_to("old.txt")
    with replacing(link) as partial:
        partial.write_text("new")
    assert link.is_symlink()
    assert (tmp_path / "old.txt").read_text() == "new"


def test_a_failure_names_the_file_and_not_its_temporary(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "m.onnx") as partial:
        (partial.parent / partial.name).read_bytes()
    assert caught.value.filename == str(tmp_path / "m.onnx")


def test_a_full_disk_names_the_file_that_was_given(tmp_path: Path) -> None:
    """The OSError of a failed write has no file name; it is added."""
    (tmp_path / "link.bin").symlink_to("out.bin")
    with file_size_limit(1000):
        with pytest.raises(OSError, match="File too large") as caught, replacing(tmp_path / "link.bin") as partial:
            partial.write_bytes(bytes(2000))
        with (
            pytest.raises(OSError, match="File too large") as named,
            naming(tmp_path / "map"),
            (tmp_path / "map").open("wb", buffering=0) as file,
        ):
            while True:
                file.write(bytes(600))
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path / "link.bin")
    assert named.value.filename == str(tmp_path / "map")
    assert names(tmp_path) == ["link.bin", "map"]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="POSIX")
def test_a_file_that_is_mapped_gets_its_blocks(tmp_path: Path) -> None:
    with (tmp_path / "map").open("w+b") as file:
        file.truncate(2**20)
        assert os.fstat(file.fileno()).st_blocks == 0  # a hole
        reserve(file.fileno())
        assert os.fstat(file.fileno()).st_blocks * 512 >= 2**20


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "x" * 251 + ".png"])
def test_every_name_that_the_file_system_takes_can_be_written(tmp_path: Path, name: str) -> None:
    other = name[:-5] + "y" + name[-4:]  # both at once, as threads do
    with replacing(tmp_path / name) as partial, replacing(tmp_path / other) as second:
        partial.write_text("one")
        second.write_text("two")
    assert (tmp_path / name).read_text() == "one"
    assert names(tmp_path) == sorted([name, other])


HOLDS = """
import sys, time
from pathlib import Path
from cloudrt.system.files import replacing
with replacing(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    print(partial.name, flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_later_run_removes_what_a_killed_one_left_and_nothing_else(tmp_path: Path) -> None:
    """Leftovers are identified by process id and start time: another process may have got the id since."""
    held = subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path / "s.npz"], stdout=subprocess.PIPE, text=True)
    assert held.stdout
    try:
        partial = held.stdout.readline().strip()
        assert names(tmp_path) == [partial]
        with replacing(tmp_path / "first") as path:
            path.write_text("")
        assert names(tmp_path) == sorted([partial, "first"])  # the process is running
    finally:
        held.send_signal(signal.SIGKILL)
        held.communicate()
    own = partial_path(tmp_path / "s.npz").name
    machine = partial.rpartition("-")[0].rpartition("-")[0].rpartition(".")[2]
    same_id = own.rpartition("-")[0] + "-1.part"  # of a process that had this one's id
    elsewhere = partial.replace(machine, "0" * 16)
    others = [own, elsewhere, "a.part", ".a.1.part", ".a.b.part", f"s.{machine}-1-1.part"]
    for name in (same_id, *others):
        (tmp_path / name).write_text("half")
    (tmp_path / partial.replace("s.npz", "folder")).mkdir()
    (tmp_path / partial.replace("s.npz", "folder") / "images.npy").write_text("half")
    remove_leftovers(tmp_path)
    assert partial in names(tmp_path)  # a process removes leftovers only once
    code = "import sys; from pathlib import Path; from cloudrt.system.files import remove_leftovers as r; r(Path('.'))"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert names(tmp_path) == sorted(["first", *others])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_hidden_processes_may_be_running(monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc may hide the processes of other users (hidepid), and some systems have no /proc."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    started = files._started(ended.pid)
    ended.wait()
    deadline = time.monotonic() + 10
    while files._started(ended.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert started and files._ended(ended.pid, started)
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", lambda *_: (_ for _ in ()).throw(PermissionError()))
        assert not files._ended(ended.pid, started)
    monkeypatch.setattr(files, "_started", lambda _: None)
    assert not files._ended(ended.pid, started)


def test_a_lock_is_held_until_the_end_of_the_block(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", "wait"), pytest.raises(DataError, match="by another run: wait"):  # noqa: SIM117
        with locked(tmp_path / "lock", "wait"):
            pass
    with locked(tmp_path / "lock", "wait"):
        pass


def test_a_failed_block_leaves_no_lock_behind(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    with pytest.raises(DataError, match="no"), locked(folder / "lock", "wait"):
        raise DataError("no")
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="no"), locked(folder / "lock", "wait"):
        (folder / "result").write_text("kept")
        raise DataError("no")
    assert sorted(path.name for path in folder.iterdir()) == ["lock", "result"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX locks")
def test_a_lock_file_that_was_removed_meanwhile_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lock_late(file: IO[bytes]) -> bool:
        (tmp_path / "lock").unlink()
        return True

    monkeypatch.setattr(files, "try_lock", lock_late)
    with pytest.raises(DataError, match="by another run: wait"), locked(tmp_path / "lock", "wait"):
        pass


def test_a_file_system_without_locks_is_not_taken_for_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Lustre mounted without `flock` answers ENOSYS, NFS without its lock service ENOLCK."""
    fcntl = pytest.importorskip("fcntl")

    def flock(file: object, kind: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "lock", "wait"):
        pass
    assert "no locks on this file system" in caplog.text
