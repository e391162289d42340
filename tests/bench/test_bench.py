"""The benchmark: figures of every stage, results compared before timing, and no personal names in the JSON file."""

from __future__ import annotations

import getpass
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloudrt.bench import notebook
from cloudrt.bench.agreement import AgreementError
from cloudrt.bench.measure import bench as run_bench
from cloudrt.bench.options import BenchOptions
from cloudrt.bench.stages import Stage, StageTime, Timing, measure, passes
from numpy.typing import NDArray
from support.commands import invoke
from support.tiny import tiny_artifact, write_jpeg

from cloudrt.cli.bench import bench
from cloudrt.labels import Labels
from cloudrt.masks.rle import rle_encode
from cloudrt.options import CudaOptions, RunOptions
from cloudrt.system.progress import no_progress

ONLY_STAGES = ("--only", "stages")
CPU = RunOptions("cpu")
STAGES = ["decode", "infer", "post-process", "end to end"]
FIELDS = {
    "schema",
    "machine",
    "versions",
    "command",
    "model",
    "images",
    "notebook",
    "skipped",
    "stages",
    "pipeline",
    "agreement",
    "peak_rss_mb",
    "postprocess",
    "rle",
    "search",
    "startup",
    "ceilings",
    "throughput",
    "accuracy",
    "latency",
    "scaling",
    "host",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("model") / "model.onnx", presence=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed in range(3):
        write_jpeg(folder / f"{seed}.jpg", seed)
    return folder


def test_the_table_and_the_file(model: Path, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    output.write_text("of an earlier run")
    words = ("--max-images", 2, "--repeat", 2, "--provider", "cpu")
    result = invoke(bench, model, "--data", images, *words, "--output", output, "--overwrite")
    assert result.exit_code == 0
    for word in (
        *STAGES,
        "ratio",
        "ONNX Runtime CPU fp32, batch 1",
        "no --checkpoint was given",
        "Dice",
        "Post-processing from uint8",
        "pycocotools encode",
        "Search of 140 thresholds x 17 min areas x 4 classes on 2 images",
        "Start-up: import cloudrt",
        "Peak memory",
        "megapixels/s",
        "GFLOP per image",
        "Engine, images/s by batch size",
        "Speed and accuracy; Dice against model.onnx in ONNX Runtime CPU",
        "Latency of one image, file to RLE: p50",
    ):
        assert word in result.stdout
    done = json.loads(output.read_text())
    assert set(done) == FIELDS
    assert done["schema"] == 4
    assert [(one["kind"], one["form"]) for one in done["postprocess"]] == [
        (kind, form) for kind in ("dense", "smooth", "network") for form in ("uint8, RLE order", "float32, C order")
    ]
    for one in done["postprocess"]:
        assert {"notebook", "OpenCV", "scipy", "cc3d", "pycocotools encode", "floor"} <= {
            p["name"] for p in one["peers"]
        }
        assert all(0 < peer["low"] <= peer["ratio"] <= peer["high"] for peer in one["peers"])
        assert set(one["parts"]) == {"runs", "components", "filter", "text"}
    assert 2000 < done["postprocess"][0]["runs"] < 2400 and 50 < done["postprocess"][0]["components"] < 70
    assert 400 < done["postprocess"][2]["runs"] < 600 and 3 < done["postprocess"][2]["components"] < 5
    assert set(done["rle"]) == {"dense", "smooth", "network"}
    assert done["search"]["loop_calls"] == 2 * 4 * 140 * 17
    assert done["search"]["ratio"] == pytest.approx(done["search"]["loop_seconds"] / done["search"]["seconds"])
    assert all(done["startup"][name] > 0 for name in ("import_s", "first_call_s"))
    assert [stage["name"] for stage in done["stages"]] == STAGES
    for stage in done["stages"]:
        for way in ("ours", "notebook"):
            figures = stage[way]
            assert len(figures["repetitions_s"]) == 2
            assert figures["median_s"] > 0
            assert figures["iqr_s"] >= 0
            assert figures["images_per_second"] == pytest.approx(1 / figures["median_s"])
        assert stage["ratio"] == pytest.approx(stage["notebook"]["median_s"] / stage["ours"]["median_s"])
    assert done["images"] == {"count": 2, "size": [140, 210], "source": "given images", "unreadable": 0}
    assert done["model"]["input_size"] == [64, 96]
    assert done["model"]["provider"] == "cpu"
    assert done["agreement"]["rows_identical"] == 8
    assert done["agreement"]["masks"] >= 6
    # The two resize a small image differently, so the submissions are similar but not identical.
    assert 0.8 < done["agreement"]["dice"] <= 1
    assert done["machine"]["usable_cores"] >= 1
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    assert ("avx2" in done["machine"]["features"].split()) == ("avx2" in flags)
    assert {"cloudrt", "python", "numpy"} <= set(done["versions"])


def test_the_file_names_no_user_host_or_folder(model: Path, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    invoke(bench, model, "--data", images, "--repeat", 1, "--provider", "cpu", "-o", output, *ONLY_STAGES, status=0)
    text = output.read_text()
    values = json.loads(text)
    for private in (str(tmp_path), str(model.parent), str(images), str(Path.home()) + "/"):
        assert private not in text
    words = set(_strings(values))
    assert not words & {getpass.getuser(), platform.node()}
    assert not [word for word in words if word.startswith("/")]
    assert values["command"][:4] == ["cloudrt-bench", "model.onnx", "--data", "DIR"]


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in [key, *_strings(item)]]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def test_scenes_are_drawn_where_no_data_are_given(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    options = BenchOptions((model,), max_images=1, repeat=1, run=RunOptions("cpu", 1), only=("stages",))
    done = run_bench(options, output, no_progress)
    assert (done.postprocess, done.rle, done.search, done.startup) == ([], {}, None, None)
    assert done.options.command()[-2:] == ["--only", "stages"]
    assert done.images == {"count": 1, "size": [1400, 2100], "source": "synthetic images", "unreadable": 0}
    assert done.to_dict() | {"peak_rss_mb": 0} == json.loads(output.read_text()) | {"peak_rss_mb": 0}


def test_the_command_states_the_options_of_the_engine() -> None:
    run = RunOptions("cuda", cuda=CudaOptions(graph=True, channels_last=False))
    assert BenchOptions(run=run).command()[-2:] == ["--cuda-graph", "--no-channels-last"]


def test_unreadable_images_are_left_out_and_counted(model: Path, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for file in images.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "bad.jpg").write_text("no image")
    result = invoke(
        bench, model, "--data", folder, "--repeat", 1, "--provider", "cpu", "-o", tmp_path / "b.json", *ONLY_STAGES
    )
    assert result.exit_code == 0
    assert "Skipped: 1 images" in result.stdout
    assert json.loads((tmp_path / "b.json").read_text())["images"]["count"] == 3


@pytest.mark.parametrize("wrong", ["rle", "components"])
def test_different_results_are_an_error_and_leave_no_file(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    def off_by_one(mask: NDArray[Any]) -> str:
        return rle_encode(np.roll(mask, 1, axis=0).astype(np.uint8))

    def every_component(probability: NDArray[Any], threshold: float, _min_area: int) -> NDArray[np.float32]:
        return (probability > threshold).astype(np.float32)

    if wrong == "rle":
        monkeypatch.setattr(notebook, "mask_to_rle", off_by_one)
    else:
        monkeypatch.setattr(notebook, "post_process", every_component)
    output = tmp_path / "bench.json"
    with pytest.raises(AgreementError, match=r"0\.jpg, Fish: .*another RLE"):
        run_bench(BenchOptions((model,), images, run=CPU, repeat=1), output, no_progress)
    result = invoke(bench, model, "--data", images, "--provider", "cpu", "--output", output)
    assert result.exit_code == 2
    assert "another RLE" in result.stderr
    assert not output.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.onnx"], "nowhere.onnx is missing"),
        (["MODEL", "--max-images", "0"], "not in the range"),
        (["MODEL", "--repeat", "0"], "not in the range"),
        (["MODEL", "--data", "nowhere"], "nowhere is missing"),
        (["MODEL", "--data", "empty"], "holds no images"),
        (["MODEL", "--data", "bad"], "none of 1 images can be read"),
        (["MODEL", "--checkpoint", "nowhere.pth"], "nowhere.pth is missing"),
        (["MODEL", "--provider", "gpu"], "'gpu' is not one of"),
        (["MODEL", "--output", "folder.json"], "is not a regular file"),
        (["MODEL", "--output", "."], "must end in .json"),
        (["MODEL", "--output", "bench.html"], "must end in .json"),
        (["MODEL", "--output", "bad/a.jpg/b.json"], "a.jpg is not a folder"),
        (["MODEL", "bad/a.jpg"], "a.jpg is not an ONNX model"),
        (["MODEL", "--baseline", "bad/a.jpg"], "a.jpg is not an ONNX model"),
        (["MODEL", "--tolerance", "nan"], "--tolerance nan is not a number"),
        (["MODEL", "other.onnx"], "other.onnx has other classes or grids than"),
        (["MODEL", "--data", "bad", "--truth", "bad/a.jpg", "--only", "stages"], "is for the accuracy part"),
    ],
)
def test_what_cannot_run_is_status_2_and_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "bad", "folder.json"):
        (tmp_path / name).mkdir()
    (tmp_path / "bad" / "a.jpg").write_text("no image")
    tiny_artifact(tmp_path / "other.onnx", (64, 96), Labels(("a", "b"), (64, 96), (32, 48)))
    monkeypatch.setattr("cloudrt.bench.measure._measure_pipeline_and_stages", lambda *_: pytest.fail("it ran"))
    result = invoke(bench, *(str(model) if word == "MODEL" else word for word in words))
    assert result.exit_code == 2
    assert said in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("*bench*"))


def test_ways_take_turns_and_the_warm_up_does_not_count() -> None:
    calls: list[str] = []
    stages = [Stage("one", lambda: calls.append("ours"), lambda: calls.append("theirs"))]
    steps: list[int] = []
    (measured,) = measure(stages, 5, 3, lambda: steps.append(1))
    assert calls == ["ours", "theirs"] * 4
    assert len(steps) == passes(stages, 3) == 8
    assert len(measured.ours.seconds) == len(measured.notebook.seconds) == 3


def test_ratio_and_spread_are_of_medians() -> None:
    measured = StageTime("x", Timing((1.0, 2.0, 100.0)), Timing((4.0, 6.0, 8.0)))
    assert measured.ratio == 3
    assert measured.notebook.iqr == 2
    assert not Timing((1.0, 1.01, 1.02)).noisy
    assert measured.ours.noisy


def test_the_bench_imports_no_other_stage_and_the_command_nothing_heavy() -> None:
    code = """
import sys
import cloudrt.cli.bench
heavy = {"onnxruntime", "numba", "pandas", "cv2", "rich"} & set(sys.modules)
import cloudrt.bench.measure
print(heavy | {"torch", "cloudrt.train", "cloudrt.export", "cloudrt.model.network"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
