"""Parity: figures that exceed their tolerances."""

from __future__ import annotations

from cloudrt.model.parity import Parity, Tolerances


def test_faults_name_each_figure() -> None:
    bad = Parity(4, "scenes", 255, float("nan"), 0.5, 0.2, 0.4, ("a.jpg",))
    faults = bad.faults(Tolerances(0.5, 0.995))
    assert [fault.partition(":")[0] for fault in faults] == [
        "mean difference, levels of 1/255",  # nan exceeds every tolerance
        "Dice between the submissions",
        "rows empty in one submission only",
    ]
    assert Parity(4, "scenes", 1, 0.1, 0.0, 1.0, 0.0, ()).faults(Tolerances(0.5, 0.995)) == []
