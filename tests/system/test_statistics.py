"""Statistics of a run: percentiles compared with NumPy's, counts and times, and the memory of the process."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudrt.system.statistics import PipelineStats, StageStats, memory, peak_memory


@given(st.lists(st.floats(2e-6, 5000), min_size=1, max_size=200), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_percentiles_are_numpys_within_two_percent(values: list[float], share: float) -> None:
    stage = StageStats(1)
    for value in values:
        stage.add(value)
    wanted = float(np.percentile(values, 100 * share, method="inverted_cdf"))
    assert stage.percentile(share) == pytest.approx(wanted, rel=0.021)
    assert stage.seconds == pytest.approx(sum(values))
    assert stage.to_dict(1.0)["latency_ms"]["max"] == pytest.approx(1000 * max(values), abs=1e-3)


def test_no_work_is_no_error() -> None:
    stage = StageStats(2)
    assert stage.percentile(0.5) == stage.load(0.0) == 0.0
    assert stage.to_dict(1.0)["count"] == 0
    stage.add(0.0)
    stage.add(1e9)  # outside of every bucket
    assert stage.percentile(1.0) > 1e4


def test_threads_count_together() -> None:
    stage = StageStats(4)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(stage.add, [0.001] * 4000))
    assert stage.count == 4000
    assert stage.seconds == pytest.approx(4.0)
    assert stage.load(2.0) == pytest.approx(0.5)


def test_the_limiting_stage_has_the_most_work_per_thread() -> None:
    stats = PipelineStats(4)
    stats["decode"].add(3.0)  # on 4 threads
    stats["infer"].add(1.0)  # on one
    assert stats.limiting() == "infer"
    stats["postprocess"].add(9.0)
    assert stats.limiting() == "postprocess"


def test_results_that_are_ready_are_counted_when_one_is_pulled() -> None:
    stage = StageStats(2)
    stage.add_all([0.001, 0.002, 0.003])
    stage.pulled()
    stage.add(0.001, 4)
    stage.pulled(6)
    stage.pulled()
    stage.add(0.001)
    stage.drop()
    stage.pulled()
    assert stage.count == 8
    assert stage.seconds == pytest.approx(0.011)
    assert stage.to_dict(1.0)["ready_when_pulled"] == {"mean": (3 + 6 + 0 + 0) / 4, "max": 6}


def test_memory_is_that_of_the_process() -> None:
    now, peak = memory(), peak_memory()
    if now is None or peak is None:
        pytest.skip("the system does not say")
    assert 10 < now <= peak * 1.01
    block = np.ones(25_000_000)
    later, peak = memory(), peak_memory()
    assert later and peak and now + 150 < later <= peak * 1.01
    assert block.sum() > 0
    assert memory(Path("gone")) is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no Linux")
def test_peak_memory_is_not_that_of_the_parent() -> None:
    script = (
        "import subprocess, sys; ballast = bytearray(400_000_000); ballast[::4096] = b'1' * len(ballast[::4096]);"
        "child = 'from cloudrt.system.statistics import peak_memory; print(peak_memory())';"
        "print(subprocess.run([sys.executable, '-c', child], capture_output=True, text=True, check=True).stdout)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) < 300
