"""Parts of the benchmark: operations, curves, the front, comparison of two runs, checks of peers, the page."""

from __future__ import annotations

import copy
import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from cloudrt.bench import accuracy, agreement, networks, peers, scaling, throughput
from cloudrt.bench.accuracy import Way, mark_front, measure_accuracy, read_truth
from cloudrt.bench.bench_page import write_bench_page
from cloudrt.bench.compare import compare
from cloudrt.bench.figures import SCHEMA
from cloudrt.bench.flops import count_flops
from cloudrt.bench.stages import Timing
from cloudrt.bench.throughput import Point, measure_throughput
from cloudrt.bench.workload import Workload, make_workload
from cloudrt.export.ensemble import Ensemble
from cloudrt.export.source import ExportSource
from support.html import Page
from support.networks import make_checkpoint
from support.paths import ROOT
from support.tiny import SMALL_GRIDS, tiny_artifact, write_jpeg
from torch.utils.flop_counter import FlopCounterMode

from cloudrt.cli.bench import bench
from cloudrt.errors import DataError
from cloudrt.images.image import ImageFile, find_images, load_image
from cloudrt.inference.pipeline import Segmenter
from cloudrt.masks.metric import score
from cloudrt.masks.rle import rle_encode
from cloudrt.model.artifact import Artifact
from cloudrt.model.checkpoint import Checkpoint
from cloudrt.system.files import sha256

STORED = ROOT / "bench" / "results"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("model") / "model.onnx", (64, 96), SMALL_GRIDS, presence=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[ImageFile]:
    folder = tmp_path_factory.mktemp("images")
    for seed in range(4):
        write_jpeg(folder / f"{seed}.jpg", seed, (280, 420))
    return find_images(folder)


def run(*words: str | Path | int) -> Result:
    result = CliRunner().invoke(bench, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_operations_are_those_that_torch_counts(source: ExportSource, checkpoint: Path) -> None:
    loaded = Checkpoint.load(checkpoint)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        loaded.network()(torch.zeros(1, 3, *loaded.config.input_size))
    assert count_flops(source.model) == counter.get_total_flops()


def test_operations_of_other_products() -> None:
    def graph(kind: str, left: list[int], right: list[int], made: list[int], **attributes: Any) -> onnx.ModelProto:
        make = onnx.helper.make_tensor_value_info
        node = onnx.helper.make_node(kind, ["image", "b"], ["c"], **attributes)
        float_ = onnx.TensorProto.FLOAT
        weight = onnx.helper.make_tensor("b", float_, right, np.zeros(right, np.float32).ravel().tolist())
        body = onnx.helper.make_graph([node], "g", [make("image", float_, left)], [make("c", float_, made)], [weight])
        return onnx.helper.make_model(body)

    assert count_flops(graph("MatMul", [1, 5, 7], [7, 3], [1, 5, 3])) == 2 * 5 * 7 * 3
    assert count_flops(graph("Gemm", [1, 7], [7, 3], [1, 3])) == 2 * 7 * 3
    # Each of 4 x 5 pixels of 3 channels is spread over 2 x 2 pixels of 6.
    assert count_flops(graph("ConvTranspose", [1, 3, 4, 5], [3, 6, 2, 2], [1, 6, 5, 6])) == 2 * 4 * 5 * 3 * 6 * 2 * 2


def test_a_curve_ends_where_it_saturates(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {1: 10.0, 2: 18.0, 4: 19.0, 8: 19.1, 16: 19.2, 32: 90.0}
    monkeypatch.setattr(throughput, "_measure", lambda _, size, threads: Point(size, threads, rates[size], 0.1))
    with Segmenter(model, provider="cpu", batch_size=2, threads=1) as segmenter:
        curves = measure_throughput(Workload(segmenter, [], [], [], tmp_path), lambda: None)
    assert [point.batch_size for point in curves["batch size"]] == [1, 2, 4, 8, 16]
    assert "threads" not in curves  # there is only one


def test_rates_are_measured_at_each_batch_and_thread(model: Path, files: list[ImageFile], tmp_path: Path) -> None:
    with Segmenter(model, provider="cpu", batch_size=2, threads=2) as segmenter:
        curves = measure_throughput(make_workload(segmenter, files, tmp_path), lambda: None)
    assert [point.threads for point in curves["threads"]] == [1, 2]
    assert {point.batch_size for point in curves["threads"]} == {2}
    assert all(point.images_per_second > 0 for points in curves.values() for point in points)


def test_the_front_is_not_dominated() -> None:
    random = np.random.default_rng(0)
    ways = [
        Way("m", "cpu", "fp32", Timing((seconds,)), dice, 0.0)
        for seconds, dice in zip(random.integers(1, 6, 30) / 10, random.integers(1, 6, 30) / 10, strict=True)
    ]
    for way in mark_front(ways):
        better = [
            other
            for other in ways
            if (other.timing.median, -other.dice) != (way.timing.median, -way.dice)
            and other.timing.median <= way.timing.median
            and other.dice >= way.dice
        ]
        assert way.front == (not better)


def test_accuracy_is_the_competitions_dice(
    model: Path, files: list[ImageFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = tiny_artifact(tmp_path / "half.onnx", (64, 96), SMALL_GRIDS, presence=True, precision="fp16")
    truth, expected = tmp_path / "truth.csv", tmp_path / "ours.csv"
    random = np.random.default_rng(0)
    lines, ours = [], []
    with Segmenter(model, provider="cpu") as segmenter:
        for result in segmenter.predict(files):
            for label in segmenter.labels.classes:
                mask = np.zeros(SMALL_GRIDS.label_grid, np.uint8)
                mask[: random.integers(0, len(mask))] = 1
                lines.append(f"{result.image}_{label},{rle_encode(mask)}")
                ours.append(f"{result.image}_{label},{result.rle[label]}")
    for path, rows in ((truth, lines), (expected, ours)):
        path.write_text("Image_Label,EncodedPixels\n" + "\n".join(rows) + "\n", encoding="utf-8")
    monkeypatch.setattr("cloudrt.bench.accuracy.WAYS", ("cpu", "cuda"))
    known = read_truth(truth, files, SMALL_GRIDS)
    found = measure_accuracy([model, half], files, known, tmp_path, 1, lambda: None)
    assert [(way.model, way.precision) for way in found.ways] == [("model.onnx", "fp32"), ("half.onnx", "fp16")]
    assert found.ways[0].dice == pytest.approx(score(expected, truth, SMALL_GRIDS, None).mean)
    assert found.against == "the truth"
    assert set(found.skipped) == {"model.onnx, cuda", "half.onnx, cuda"}
    masks = [row["EncodedPixels"] for row in csv.DictReader(truth.read_text().splitlines())]
    assert found.all_empty == pytest.approx(sum(not text for text in masks) / len(masks))
    monkeypatch.setattr(accuracy, "CHUNK", 2)  # the four images are then run once, in two chunks
    turns: list[None] = []
    chunked = measure_accuracy([model, half], files, known, tmp_path, 1, lambda: turns.append(None))
    assert [len(way.timing.seconds) for way in chunked.ways] == [2, 2] and chunked.all_empty == found.all_empty
    assert [way.dice for way in chunked.ways] == [way.dice for way in found.ways]
    assert len(turns) == accuracy.rounds([model, half], files, 1)
    without = measure_accuracy([half, model], files, None, tmp_path, 1, lambda: None)
    assert without.against == "model.onnx in ONNX Runtime CPU"  # the one in fp32
    assert without.ways[1].dice == 1 and without.ways[1].empty_mismatch == 0


@pytest.mark.parametrize(("presence", "tta"), [("none", "none"), ("head", "hv"), ("top-k", "h")])
def test_torch_peers_answer_as_the_graph(files: list[ImageFile], tmp_path: Path, presence: str, tta: str) -> None:
    made = make_checkpoint(tmp_path / "best.pth", presence=presence, top_k=700)
    artifact = Artifact(checkpoint_sha256=sha256(tmp_path / "best.pth"), tta=tta)
    graph = Ensemble((made,), tta=tta).graph()
    plain = networks.TorchNetwork(tmp_path / "best.pth", artifact)
    half = networks.TorchGraph(networks.load_checkpoint(tmp_path / "best.pth", artifact), tta)
    assert half.name == "PyTorch channels last bf16, batch 1"
    for file in files[:2]:
        image = load_image(file.path, (64, 96))
        with torch.inference_mode():
            found = graph(torch.from_numpy(image[None]))
        levels, said = found if isinstance(found, tuple) else (found, None)
        wanted = levels[0].numpy().transpose(0, 2, 1).astype(int)
        for network, scale, most in ((plain, 255, 1), (half, 1, 12)):
            probability, told = network(image)
            close = np.abs(np.round(probability * scale) - wanted) <= most
            assert close.mean() > 0.99  # except at the edge of no-data bands
            assert (told is None) == (said is None)
            if told is not None and said is not None:
                assert np.abs(told.astype(int) - said[0].numpy().astype(int)).max() <= most + 1


def test_peers_are_checked_and_named(
    model: Path, files: list[ImageFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")

    def gone() -> Any:
        raise ModuleNotFoundError("No module named 'thing'", name="thing")

    def wrong() -> Any:
        network = networks.OnnxNetwork(model, 1)
        monkeypatch.setattr(
            networks.OnnxNetwork, "__call__", lambda self, image: (np.zeros((4, 350, 525), np.uint8), None)
        )
        return network

    with Segmenter(model, provider="cpu", batch_size=2, threads=1) as segmenter:
        work = make_workload(segmenter, files, tmp_path)
        openers: dict[str, Callable[[], Any]] = {
            "OpenVINO": lambda: networks.OpenvinoNetwork(model, 1),
            "Thing": gone,
            "Liar": wrong,
        }
        opened, skipped = agreement.open_networks(openers, work)
    assert list(opened) == ["OpenVINO, batch 1"]
    assert skipped["Thing"] == "thing is not installed"
    assert "its masks differ from ours" in skipped["Liar"]


def test_an_image_costs_the_same_in_longer_runs(model: Path, files: list[ImageFile], tmp_path: Path) -> None:
    steps: list[None] = []
    with Segmenter(model, provider="cpu", batch_size=2, threads=1) as segmenter:
        work = Workload(segmenter, files, [], [], tmp_path)
        found = scaling.measure_scaling(work, lambda: steps.append(None), (3, 7))
    assert [one.images for one in found.runs] == [3, 7]
    assert len(steps) == 3 + 3 + 7
    assert found.cost == pytest.approx(found.runs[1].seconds / found.runs[0].seconds)


def bench_of(**ratios: float) -> dict[str, Any]:
    def timing(seconds: float, spread: float = 0.0) -> dict[str, float]:
        return {"median_s": seconds, "iqr_s": spread * seconds}

    return {
        "machine": {"cpu": "a"},
        "versions": {},
        "model": {},
        "images": {},
        "stages": [
            {"name": "decode", "ratio": ratios.get("decode", 2.0), "ours": timing(1), "notebook": timing(2)},
            {"name": "infer", "ratio": ratios.get("infer", 3.0), "ours": timing(1, 0.2), "notebook": timing(3, 0.2)},
        ],
        "pipeline": {
            "whole": timing(1),
            "share_of_ceiling": ratios.get("share", 0.9),
            "peers": {"x": timing(2) | {"ratio": ratios.get("x", 2.0)}},
        },
        "postprocess": [
            {"kind": "dense", "form": "uint8", "peers": [{"name": "OpenCV", "ratio": 30.0, "low": 29.0, "high": 31.0}]}
        ],
        "search": None,
    }


@pytest.mark.parametrize(
    ("ratios", "worse", "better"),
    [
        ({}, [], []),
        ({"decode": 1.85}, [], []),  # within the tolerance
        ({"decode": 1.7}, ["decode, compared with the notebook's way"], []),
        ({"infer": 2.0}, [], []),  # noisy
        ({"infer": 0.5}, ["infer, compared with the notebook's way"], []),
        ({"share": 0.5, "x": 3.0}, ["files to CSV, share of the ceiling"], ["files to CSV, compared with x"]),
    ],
)
def test_only_falls_beyond_the_noise_are_regressions(
    ratios: dict[str, float], worse: list[str], better: list[str]
) -> None:
    found = compare(bench_of(), bench_of(**ratios))
    assert [change.name for change in found.regressions] == worse
    assert [change.name for change in found.changes if change.verdict == "better"] == better
    assert len(found.changes) == 5
    assert found.differences == []


def test_a_great_fall_is_worse_and_a_great_rise_better_in_any_noise() -> None:
    slow, fast = bench_of(x=1), bench_of(x=1000)
    for values in (slow, fast):
        values["pipeline"]["whole"]["iqr_s"] = 0.6 * values["pipeline"]["whole"]["median_s"]
    for before, after, verdict in ((fast, slow, "worse"), (slow, fast, "better")):
        found = compare(before, after)
        assert [change.verdict for change in found.changes if change.name.endswith("compared with x")] == [verdict]


def test_what_only_one_run_has_is_named() -> None:
    other = bench_of()
    other["pipeline"], other["machine"] = None, {"cpu": "b"}
    found = compare(bench_of(), other)
    assert found.only_before == ["files to CSV, share of the ceiling", "files to CSV, compared with x"]
    assert found.differences == ["cpu: a before, b now"]


def test_a_regression_fails_the_command(model: Path, files: list[ImageFile], tmp_path: Path) -> None:
    words = (model, "--data", files[0].path.parent, "--provider", "cpu", "--batch-size", 2, "--repeat", 2)
    only = ("--only", "pipeline", "--only", "throughput", "--only", "accuracy", "--only", "latency")
    first = run(*words, *only, "-o", tmp_path / "a.json")
    assert first.exit_code == 0, first.output
    page = Page(tmp_path / "a.html")
    assert "Speed and accuracy" in page.text and "Throughput of the engine" in page.text
    values = json.loads((tmp_path / "a.json").read_text())
    sunk, raised = copy.deepcopy(values), copy.deepcopy(values)
    for changed, factor in ((sunk, 1e-3), (raised, 1e3)):
        changed["pipeline"]["share_of_ceiling"] *= factor
        for peer in changed["pipeline"]["peers"].values():
            peer["ratio"] *= factor
    (tmp_path / "sunk.json").write_text(json.dumps(sunk))
    (tmp_path / "raised.json").write_text(json.dumps(raised))
    better = run(
        *words, "--only", "pipeline", "-o", tmp_path / "b.json", "--overwrite", "--compare", tmp_path / "sunk.json"
    )
    assert better.exit_code == 0 and "better" in better.output
    worse = run(
        *words, "--only", "pipeline", "-o", tmp_path / "b.json", "--overwrite", "--compare", tmp_path / "raised.json"
    )
    assert worse.exit_code == 1 and "worse" in worse.output
    for content, said in (
        ("{}", "not a file of cloudrt-bench"),
        ("[]", "not a file of cloudrt-bench"),
        ("{", "or is damaged"),
        ('{"schema": 1}', "has schema 1"),
        (f'{{"schema": {SCHEMA}}}', "damaged, at 'stages'"),
    ):
        (tmp_path / "c.json").write_text(content)
        refused = run(*words, "-o", tmp_path / "b.json", "--overwrite", "--compare", tmp_path / "c.json")
        assert refused.exit_code == 2 and said in refused.output
    nothing = run(
        *words, "--only", "latency", "-o", tmp_path / "b.json", "--overwrite", "--compare", tmp_path / "a.json"
    )
    assert nothing.exit_code == 2 and "no ratio in common" in nothing.output
    assert run(model, "--truth", tmp_path / "a.json", "-o", tmp_path / "d.json").exit_code == 2


def test_the_page_makes_no_requests(tmp_path: Path) -> None:
    """Also with parts left out."""
    values = bench_of() | {
        "pipeline": None,
        "stages": [],
        "postprocess": [],
        "accuracy": None,
        "throughput": None,
        "ceilings": None,
        "latency": None,
        "scaling": None,
        "startup": None,
        "skipped": {"<peer>": "why & how"},
        "command": ["<x>"],
        "versions": {"numpy": "2"},
        "model": {
            "file": "<m>.onnx",
            "architecture": "FPN",
            "encoder": "e",
            "precision": "fp16",
            "plan": "cpu",
            "input_size": [64, 96],
        },
        "images": {"count": 2, "source": "given images", "size": [64, 96]},
        "machine": {"cpu": "c", "usable_cores": 2},
    }
    write_bench_page(values, tmp_path / "b.html")
    page = Page(tmp_path / "b.html")
    assert "<m>.onnx" in page.text
    assert "http" not in page.source and "<script" not in page.source


def test_models_of_one_name_are_told_apart() -> None:
    found = accuracy._tell_apart([Path("runs/a/model.onnx"), Path("runs/b/model.onnx"), Path("model.onnx")])
    assert found == ["a/model.onnx", "b/model.onnx", "model.onnx"]
    assert accuracy._tell_apart([Path("x/a.onnx"), Path("x/b.onnx")]) == ["a.onnx", "b.onnx"]


def test_a_truth_has_a_sound_row_for_each_image(files: list[ImageFile], tmp_path: Path) -> None:
    truth = tmp_path / "truth.csv"
    keys = [f"{file.key}_{label}" for file in files for label in SMALL_GRIDS.classes]
    for rows, said in ((keys[1:], f"no row for {keys[0]}"), ([f"{keys[0]},2 3 1 9", *keys[1:]], f"{keys[0]}: RLE")):
        truth.write_text("Image_Label,EncodedPixels\n" + "\n".join(r if "," in r else r + "," for r in rows) + "\n")
        with pytest.raises(DataError, match=said):
            read_truth(truth, files, SMALL_GRIDS)


def test_peers_of_post_processing_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cc3d", "pycocotools"):
        monkeypatch.setitem(sys.modules, module, None)
    assert peers.missing() == {
        "cc3d": "cc3d is not installed",
        "pycocotools encode": "pycocotools is not installed",
    }
