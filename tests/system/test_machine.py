"""The hardware that a process may use: the smaller of what the machine has and what the container allows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cloudrt.system import machine
from cloudrt.system.machine import usable_cpus


@pytest.fixture
def sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU set of 16 cores on a machine of 64."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


@pytest.mark.usefixtures("sixteen")
@pytest.mark.parametrize(
    ("cpu_max", "cpus"),
    [
        ("max 100000\n", 16),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),  # one and a half cores keep two threads busy
        ("50000 100000\n", 1),
        ("1000 100000\n", 1),
        ("3200000 100000\n", 16),
        ("400000 50000", 8),
        ("", 16),
        ("nonsense", 16),
        ("x y\n", 16),
        ("100000\n", 16),
    ],
)
def test_quota(tmp_path: Path, cpu_max: str, cpus: int) -> None:
    path = tmp_path / "cpu.max"
    path.write_text(cpu_max)
    assert usable_cpus(path) == cpus


@pytest.mark.usefixtures("sixteen")
def test_no_control_group(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path / "none") == 16
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert usable_cpus(tmp_path / "binary") == 16


@pytest.mark.parametrize(("count", "cpus"), [(8, 8), (None, 1)])
def test_systems_without_cpu_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int | None, cpus: int
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert usable_cpus(tmp_path / "none") == cpus


def test_this_machine() -> None:
    assert 1 <= usable_cpus() <= (os.cpu_count() or 1)


def test_cpuinfo_and_memory_limit(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nmodel name\t: Fast CPU @ 3 GHz\nflags\t\t: fpu avx2 amx_int8\n\n"
    )
    assert machine._read_cpuinfo(tmp_path / "cpuinfo") == ("Fast CPU @ 3 GHz", ("avx2", "amx_int8"))
    assert machine._read_cpuinfo(tmp_path / "none")[1] == ()
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    assert machine._memory(tmp_path / "memory.max") == 1.0
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._memory(tmp_path / "memory.max") == machine._memory(tmp_path / "none") > 1.0
