"""Parts of the benchmark: FLOPs, throughput by batch size and threads, the Pareto front, accuracy, checks of peers."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cloudrt.bench import accuracy, agreement, networks, peers, scaling, throughput
from cloudrt.bench.accuracy import Way, mark_front, measure_accuracy, read_truth
from cloudrt.bench.flops import count_flops
from cloudrt.bench.stages import Timing
from cloudrt.bench.throughput import Point, measure_throughput
from cloudrt.bench.workload import Workload, make_workload
from cloudrt.export.ensemble import Ensemble
from cloudrt.export.graph import describe
from cloudrt.export.source import ExportSource
from support.networks import make_checkpoint
from support.tiny import SMALL_GRIDS, tiny_artifact
from torch.utils.flop_counter import FlopCounterMode

from cloudrt.errors import DataError, ImageError
from cloudrt.images.image import ImageFile, find_images, load_image
from cloudrt.inference.pipeline import Segmenter
from cloudrt.masks.metric import score
from cloudrt.masks.rle import rle_encode
from cloudrt.model.checkpoint import Checkpoint
from cloudrt.options import RunOptions
from cloudrt.system.files import sha256
from cloudrt.system.progress import Advance, no_progress


@pytest.fixture
def files(images: Path) -> list[ImageFile]:
    return find_images(images)[:4]


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
    # Each of the 4 x 5 input pixels (3 channels) contributes to 2 x 2 output pixels (6 channels).
    assert count_flops(graph("ConvTranspose", [1, 3, 4, 5], [3, 6, 2, 2], [1, 6, 5, 6])) == 2 * 4 * 5 * 3 * 6 * 2 * 2


def test_batch_sizes_end_where_the_rate_saturates(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    totals: list[int] = []
    steps: list[int] = []

    @contextmanager
    def bar(_: str, total: int) -> Iterator[Advance]:
        totals.append(total)
        yield lambda n=1, **__: steps.append(n)

    rates = {1: 10.0, 2: 18.0, 4: 19.0, 8: 19.1, 16: 19.2, 32: 90.0}
    monkeypatch.setattr(throughput, "_measure", lambda _, size, threads: Point(size, threads, rates[size], 0.1))
    with Segmenter(model, provider="cpu", batch_size=2, threads=1) as segmenter:
        curves = measure_throughput(Workload(segmenter, [], [], [], tmp_path), bar)
    assert totals == [len([1, 2, 4, 8, 16, 32, 64, 128, 256])] == [sum(steps)]  # the bar is complete at the end
    assert [point.batch_size for point in curves["batch size"]] == [1, 2, 4, 8, 16]
    assert "threads" not in curves  # there is only one


def test_rates_are_measured_at_each_batch_and_thread(model: Path, files: list[ImageFile], tmp_path: Path) -> None:
    with Segmenter(model, provider="cpu", batch_size=2, threads=2) as segmenter:
        curves = measure_throughput(make_workload(segmenter, files, tmp_path), no_progress)
    assert [point.threads for point in curves["threads"]] == [1, 2]
    assert {point.batch_size for point in curves["threads"]} == {2}
    assert all(point.images_per_second > 0 for points in curves.values() for point in points)


def test_no_way_dominates_the_pareto_front() -> None:
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
    monkeypatch.setattr(accuracy, "WAYS", ("cpu", "cuda"))
    monkeypatch.setattr(accuracy, "artifact_problem", lambda provider, _: "no GPU" if provider == "cuda" else None)
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
    with monkeypatch.context() as patch:
        patch.setattr(accuracy, "WAYS", ("cuda",))
        with pytest.raises(DataError, match=r"no model runs: .*cuda: no GPU"):
            measure_accuracy([model], files, None, tmp_path, 1, lambda: None)
    without = measure_accuracy([half, model], files, None, tmp_path, 1, lambda: None)
    assert without.against == "model.onnx in ONNX Runtime CPU"  # the one in fp32
    assert without.ways[1].dice == 1 and without.ways[1].empty_mismatch == 0


def test_a_reference_that_the_cpu_provider_cannot_run_is_named(
    model: Path, files: list[ImageFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated by a list of providers without the CPU provider."""
    pytest.importorskip("openvino")
    monkeypatch.setattr("cloudrt.bench.accuracy.WAYS", ("openvino",))
    found = measure_accuracy([model], files, None, tmp_path, 1, lambda: None)
    assert found.against == "model.onnx in openvino"


def test_the_limit_of_pixels_applies_to_the_images(model: Path, files: list[ImageFile], tmp_path: Path) -> None:
    with Segmenter(model, RunOptions("cpu", 1, max_pixels=420 * 280)) as segmenter:
        make_workload(segmenter, files[:1], tmp_path)
    below = RunOptions("cpu", 1, max_pixels=420 * 280 - 1)
    with Segmenter(model, below) as segmenter, pytest.raises(ImageError, match="oversized"):
        make_workload(segmenter, files[:1], tmp_path)


@pytest.mark.parametrize(
    ("presence", "tta", "members"), [("none", "none", 1), ("head", "hv", 2), ("top-k", "h", 1), ("top-k", "none", 2)]
)
def test_torch_peers_answer_as_the_graph(
    files: list[ImageFile], tmp_path: Path, presence: str, tta: str, members: int
) -> None:
    paths = [tmp_path / f"{number}.pth" for number in range(members)]
    made = [make_checkpoint(path, presence=presence, top_k=700, seed=number) for number, path in enumerate(paths)]
    artifact = describe(Ensemble(tuple(made), tuple(sha256(path) for path in paths), tta), "fp32")
    graph = Ensemble(tuple(made), tta=tta).graph()
    loaded = networks.load_ensemble(paths[::-1], artifact)  # in any order
    plain, half = networks.TorchNetwork(loaded), networks.TorchGraph(loaded)
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
            "Wrong": wrong,
        }
        opened, skipped = agreement.open_networks(openers, work)
    assert list(opened) == ["OpenVINO, batch 1"]
    assert skipped["Thing"] == "thing is not installed"
    assert "its masks differ from ours" in skipped["Wrong"]


def test_the_cost_of_an_image_in_longer_runs(model: Path, files: list[ImageFile], tmp_path: Path) -> None:
    steps: list[None] = []
    with Segmenter(model, provider="cpu", batch_size=2, threads=1) as segmenter:
        work = Workload(segmenter, files, [], [], tmp_path)
        found = scaling.measure_scaling(work, lambda: steps.append(None), (3, 7))
    assert [one.images for one in found.runs] == [3, 7]
    assert len(steps) == 3 + 3 + 7
    assert found.cost == pytest.approx(found.runs[1].seconds / found.runs[0].seconds)


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
