"""The pipeline without a network: shares computed by hand, outputs of the stand-ins, the table, JSON and page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from cloudrt.bench import host
from cloudrt.bench.compare import compare
from cloudrt.bench.stages import Timing
from cloudrt.bench.stand_ins import Instant, StandIn
from support.html import Page
from support.tiny import write_jpeg

from cloudrt.cli.bench import bench
from cloudrt.inference.pipeline import Segmenter
from cloudrt.masks.postprocess import postprocess_batch


def test_shares_by_hand() -> None:
    found = host.Host(
        handover={8: Timing((2e-5, 2e-5)), 128: Timing((1e-5, 1e-5))},
        alone={8: Timing((0.009, 0.018, 0.01))},
        whole={8: Timing((0.01, 0.02, 0.02))},
        overlap=Timing((host.STAGE_S / 0.9,)),
        threads=2,
    )
    assert found.evenness == pytest.approx(0.5)
    assert found.share(8) == pytest.approx(0.9)
    assert found.overlap_share == pytest.approx(0.9)
    values = found.to_dict()
    assert values["handover"]["128"]["images_per_second"] == pytest.approx(1e5)
    assert values["postprocess"]["8"]["share"] == pytest.approx(0.9)


def test_the_stand_in_post_processes_its_maps(model: Path) -> None:
    """Rows are those of the maps, whatever the inputs are."""
    with Segmenter(model, provider="cpu", batch_size=1, threads=2) as segmenter, StandIn(segmenter) as ours:
        random = np.random.default_rng(0)
        levels = random.integers(0, 256, (3, *ours.artifact.output_shape), np.uint8)
        presence = random.integers(0, 256, (3, 3), np.uint8)
        ours.use(Instant(ours.artifact, 3, levels, presence), None)
        wanted = postprocess_batch(levels, ours.artifact.rules, presence)
        found = [list(result.rle.values()) for result in ours.predict([b""] * 7)]
        assert found == [*wanted, *wanted, wanted[0]]
        host.overlapping(ours, 4)
        assert ours.pool.slots == 2
        assert all(result.error is None for result in ours.predict([b""] * 20))


def test_the_part_is_shown_written_and_compared(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BLOCK_S", 0.02), ("STAGE_S", 0.002), ("BATCHES", (2, 4, 8)), ("SHARED", (2, 8))):
        monkeypatch.setattr(host, name, value)
    for seed in range(3):
        write_jpeg(tmp_path / "in" / f"{seed}.jpg", seed)
    words = [str(model), "--data", str(tmp_path / "in"), "--provider", "cpu", "--repeat", "2", "--only", "host"]
    done = CliRunner().invoke(bench, [*words, "-o", str(tmp_path / "b.json")])
    assert done.exit_code == 0, done.output
    assert "The pipeline without a network" in done.output
    values = json.loads((tmp_path / "b.json").read_text())
    found = values["host"]
    assert list(found["handover"]) == ["2", "4", "8"] and list(found["postprocess"]) == ["2", "8"]
    assert all(len(timing["repetitions_s"]) == 2 for timing in found["handover"].values())
    assert min(found["evenness"], found["overlap"]["share"], found["postprocess"]["8"]["share"]) > 0
    assert "The pipeline without a network" in Page(tmp_path / "b.html").text
    names = {change.name for change in compare(values, values).changes}
    assert names == {
        "host, slowest batch size compared with the fastest",
        "host, batch 2, compared with post-processing alone",
        "host, batch 8, compared with post-processing alone",
        "host, three stages compared with one",
    }
