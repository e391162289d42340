"""The pipeline: shares of the ceiling and ratios computed by hand, rows equal to the notebook's, memory, decoding."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from cloudrt.bench import networks, notebook, peers
from cloudrt.bench.pipeline import STAGES, PipelineTime
from cloudrt.bench.stages import Timing
from cloudrt.bench.studies import memory, scaled_decode
from support.tiny import SMALL_GRIDS

from cloudrt.cli.bench import bench
from cloudrt.data.scenes import draw_scene
from cloudrt.images.image import decode, find_images, load_image
from cloudrt.images.resize import resize
from cloudrt.inference.pipeline import Segmenter
from cloudrt.masks.rle import rle_encode
from cloudrt.masks.table import read_table


def timings(*seconds: float) -> dict[str, Timing]:
    return {name: Timing((value, value)) for name, value in zip(STAGES, seconds, strict=True)}


def test_the_share_is_that_of_the_cores_or_of_the_slower_stage() -> None:
    alone, used, whole = timings(0.01, 0.03, 0.001), timings(0.02, 0.05, 0.002), Timing((0.04, 0.04))
    on_cpu = PipelineTime(alone, whole, used, 2, {"peer": Timing((0.08, 0.12))})
    assert on_cpu.share == pytest.approx(0.072 / 2 / 0.04)
    assert on_cpu.ratio("peer") == pytest.approx(2.5)
    assert PipelineTime(alone, whole, used, 0, {}).share == pytest.approx(0.03 / 0.04)


def test_the_part_is_shown_and_written(model: Path, images: Path, tmp_path: Path) -> None:
    words = [str(model), "--data", str(images), "--provider", "cpu", "--batch-size", "2", "--repeat", "2"]
    result = CliRunner().invoke(bench, [*words, "--only", "pipeline", "-o", str(tmp_path / "b.json")])
    assert result.exit_code == 0, result.output
    done = json.loads((tmp_path / "b.json").read_text())["pipeline"]
    assert set(done["stages"]) == set(done["cpu_seconds_per_image"]) - {"whole"} == set(STAGES)
    assert done["cores"] >= 1 and done["share_of_ceiling"] > 0
    for name, peer in done["peers"].items():
        assert f"x {name}" in result.stdout
        assert len(peer["repetitions_s"]) == 2 and peer["ratio"] > 0
    assert "plain ONNX Runtime CPU fp32, batch 1" in done["peers"]
    assert any("the notebook's way" in name for name in done["peers"])


def test_the_plain_way_gives_our_rows_for_the_same_pixels(model: Path, tmp_path: Path) -> None:
    """Images of the network's input size are not resized, so that both process the same pixels."""
    for seed in range(5):
        cv2.imwrite(str(tmp_path / f"{seed}.png"), draw_scene(seed, (64, 96)).image[:, :, ::-1])
    files = find_images(tmp_path)
    with Segmenter(model, provider="cpu", batch_size=2) as segmenter:
        rows = {(r.image, label): text for r in segmenter.predict(files) for label, text in r.rle.items()}
        artifact = segmenter.artifact
    plain = networks.OnnxNetwork(model)
    notebook.write_submission(tmp_path / "plain.csv", files, plain, artifact, peers.opencv_rows)
    assert read_table(tmp_path / "plain.csv", SMALL_GRIDS) == rows
    assert any(rows.values())


def test_memory_is_watched(model: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "EVERY", 10)
    with Segmenter(model, provider="cpu", batch_size=4) as segmenter:
        found = memory.watch(segmenter, find_images(images), 25)
    assert list(found["resident_mb"]) == ["10", "20"]
    assert (found["images"], found["distinct_images"]) == (25, 6)


def test_two_decodes_are_compared(model: Path, images: Path, tmp_path: Path) -> None:
    """The truth is the result of the full decode, which scores 1; the scaled decode scores the Dice of the two."""
    files = find_images(images)
    small = (120, 180)
    with Segmenter(model, provider="cpu", batch_size=2) as segmenter:
        size = segmenter.artifact.input_size
        full = [resize(decode(file.path.read_bytes()), size) for file in files]
        scaled = [load_image(file.path, size).astype(int) for file in files]
        difference = np.mean([abs(one - other).mean() for one, other in zip(scaled, full, strict=True)])
        truth = {}
        for file, result in zip(files, segmenter.predict(full), strict=True):
            for label in SMALL_GRIDS.classes:
                mask = result.mask(label).repeat(2, axis=0).repeat(2, axis=1)
                assert mask.shape == small
                truth[file.key, label] = rle_encode(mask)
        found = scaled_decode.compare(segmenter, files, truth)
    assert found["dice_full"] == 1.0
    assert found["dice_scaled"] == pytest.approx(found["dice_between"])
    assert found["mean_pixel_difference"] == pytest.approx(difference) and difference > 0
    assert (found["images"], found["image_size"], found["input_size"]) == (6, [280, 420], [64, 96])
    done = CliRunner().invoke(scaled_decode.main, [str(model), str(images), "-o", str(tmp_path / "d.json")])
    assert done.exit_code == 0, done.output
    assert "dice_scaled" not in json.loads((tmp_path / "d.json").read_text())
