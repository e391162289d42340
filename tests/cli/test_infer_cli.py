"""`cloudrt-infer`, from the command line to the files that it leaves: exit status, messages, nothing half-written."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner, Result
from support.tiny import SMALL_GRIDS, tiny_artifact, tiny_model, write_jpeg

from cloudrt.cli.infer import infer
from cloudrt.inference.pipeline import Segmenter
from cloudrt.masks.table import read_table

LABELS = SMALL_GRIDS
HEADER = "Image_Label,EncodedPixels\n"


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Name -> content of three images."""
    folder = tmp_path_factory.mktemp("jpegs")
    return {
        name: write_jpeg(folder / name, seed).path.read_bytes() for seed, name in enumerate(("c.jpg", "a.jpg", "b.jpg"))
    }


@pytest.fixture
def images(tmp_path: Path, jpegs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the images, in the working folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "images"
    folder.mkdir()
    for name, content in jpegs.items():
        (folder / name).write_bytes(content)
    return folder


def run(*words: str | Path) -> Result:
    result = CliRunner().invoke(infer, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def names(submission: Path) -> list[str]:
    return list(dict.fromkeys(name for name, _ in read_table(submission, LABELS)))


def left(folder: Path) -> list[str]:
    """Names of everything in a folder except the images, hidden files included."""
    return sorted(entry.name for entry in folder.iterdir() if entry.name != "images")


def test_a_sound_run(images: Path, model: Path, tmp_path: Path) -> None:
    result = run(images, "--model", model, "--provider", "cpu")
    assert result.exit_code == 0
    assert "submission.csv: 3 images" in result.stdout
    assert "0 failed" in result.stdout
    assert "provider cpu" in result.stderr
    assert left(tmp_path) == ["submission.csv", "submission.run.json"]
    assert names(tmp_path / "submission.csv") == ["a.jpg", "b.jpg", "c.jpg"]
    table = read_table(tmp_path / "submission.csv", LABELS)
    with Segmenter(model, provider="cpu") as segmenter:
        for name in ("a.jpg", "b.jpg", "c.jpg"):
            (wanted,) = segmenter.predict([images / name])
            assert {label: table[name, label] for label in LABELS.classes} == wanted.rle
    assert sum(map(bool, table.values())) >= 6


def test_the_model_in_the_working_folder_is_the_default(images: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(model.read_bytes())
    result = run(images)
    assert result.exit_code == 0
    assert "model.onnx: Tiny" in result.stderr


def test_auto_names_its_provider_and_why_no_faster_one(
    images: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloudrt.engines.choice.problem", lambda name: None if name == "cpu" else f"{name} is not here")
    result = run(images, "--model", model, "-v")
    assert result.exit_code == 0
    assert "provider cpu" in result.stderr
    assert "cuda was not chosen: cuda is not here" in result.stderr
    assert "not chosen" not in run(images, "--model", model, "--overwrite").stderr  # measured before


def test_failed_images_have_empty_rows_a_reason_and_status_1(images: Path, model: Path, tmp_path: Path) -> None:
    (images / "a2.jpg").write_bytes((images / "a.jpg").read_bytes()[:-600])
    (images / "z.jpg").write_text("not an image")
    result = run(images, "--model", model)
    assert result.exit_code == 1
    assert "5 images" in result.stdout
    assert "2 failed" in result.stdout
    assert "submission.failures.csv" in result.stderr
    table = read_table(tmp_path / "submission.csv", LABELS)
    assert names(tmp_path / "submission.csv") == ["a.jpg", "a2.jpg", "b.jpg", "c.jpg", "z.jpg"]
    assert not any(text for (name, _), text in table.items() if name in ("a2.jpg", "z.jpg"))
    with (tmp_path / "submission.failures.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["image", "reason"]
    assert [name for name, _ in rows] == ["a2.jpg", "z.jpg"]
    assert all(reason for _, reason in rows)
    # The rows of the sound images do not depend on the others.
    for name in ("a2.jpg", "z.jpg"):
        (images / name).unlink()
    assert run(images, "--model", model, "--overwrite").exit_code == 0
    again = read_table(tmp_path / "submission.csv", LABELS)
    assert all(table[key] == text for key, text in again.items())
    assert left(tmp_path) == ["submission.csv", "submission.run.json"], "the failures of the run before are gone"


def test_a_sample_decides_order_and_names_what_is_missing(images: Path, model: Path, tmp_path: Path) -> None:
    sample = tmp_path / "sample.csv"
    sample.write_text(
        HEADER + "".join(f"{name}_{label},1 1\n" for name in ("c.jpg", "x.jpg", "a.jpg") for label in LABELS.classes)
    )
    result = run(images, "--model", model, "--sample", sample)
    assert result.exit_code == 1
    assert names(tmp_path / "submission.csv") == ["c.jpg", "x.jpg", "a.jpg"]
    assert "x.jpg" in (tmp_path / "submission.failures.csv").read_text()
    assert list(read_table(tmp_path / "submission.csv", LABELS)) == list(read_table(sample, LABELS))


def test_keys_with_folders_spaces_commas_and_unicode(
    images: Path, model: Path, tmp_path: Path, jpegs: dict[str, bytes]
) -> None:
    (images / "sub dir").mkdir()
    keys = ["sub dir/wölk chen.jpg", "a,b.jpg", "under_score_Fish.jpg", "雲.jpg"]
    for key in keys:
        (images / key).write_bytes(jpegs["a.jpg"])
    assert run(images, "--model", model).exit_code == 0
    table = read_table(tmp_path / "submission.csv", LABELS)
    assert set(keys) <= {name for name, _ in table}
    for key in keys:
        assert [table[key, label] for label in LABELS.classes] == [table["a.jpg", label] for label in LABELS.classes]


def test_an_existing_output_is_refused_and_kept(images: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "submission.csv").write_text("precious")
    result = run(images, "--model", model)
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr
    assert (tmp_path / "submission.csv").read_text() == "precious"
    assert run(images, "--model", model, "--output", "other.csv").exit_code == 0
    assert run(images, "--model", model, "--overwrite").exit_code == 0
    assert (tmp_path / "submission.csv").read_bytes() == (tmp_path / "other.csv").read_bytes()


def test_an_output_in_a_new_folder(images: Path, model: Path, tmp_path: Path) -> None:
    assert run(images, "--model", model, "--output", "new/folder/s.csv").exit_code == 0
    assert left(tmp_path / "new" / "folder") == ["s.csv", "s.run.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_half_written_when_it_stops_in_the_middle(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    (tmp_path / "submission.csv").write_text("old")
    real = Segmenter.predict

    def stops(self: Segmenter, inputs: Iterable[object]) -> Iterator[object]:
        yield from list(real(self, inputs))[:2]  # type: ignore[arg-type]
        raise error

    monkeypatch.setattr(Segmenter, "predict", stops)
    result = CliRunner().invoke(infer, [str(images), "--model", str(model), "--overwrite"])
    assert result.exit_code != 0
    assert left(tmp_path) == ["submission.csv", "submission.csv.journal"]
    assert (tmp_path / "submission.csv").read_text() == "old"


def test_a_provider_that_cannot_run_is_status_2(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloudrt.engines.choice.problem", lambda name: f"no {name}: pip install '.[{name}]'")
    result = run(images, "--model", model, "--provider", "cuda")
    assert result.exit_code == 2
    assert "pip install '.[cuda]'" in result.stderr
    assert left(tmp_path) == []


def test_an_artifact_without_metadata_is_status_2(images: Path, tmp_path: Path) -> None:
    stranger = tiny_model()
    del stranger.metadata_props[:]
    (tmp_path / "stranger.onnx").write_bytes(stranger.SerializeToString())
    result = run(images, "--model", "stranger.onnx")
    assert result.exit_code == 2
    assert "cloudrt-export" in result.stderr
    assert "Traceback" not in result.stderr
    assert left(tmp_path) == ["stranger.onnx"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere is missing"),
        (["images", "--model", "nowhere.onnx"], "cloudrt-export"),
        (["images", "--provider", "gpu"], "'gpu' is not one of"),
        (["images", "--batch-size", "0"], "not in the range"),
        (["images", "--sample", "nowhere.csv"], "nowhere.csv is missing"),
        (["images", "--output", "images.csv", "--overwrite"], "regular file"),
        (["images", "--output", "s.csv", "--format", "parquet"], "--format parquet: the suffix decides the format"),
        (["images", "--output", "s.parquet", "--format", "csv"], "--format csv: the suffix decides the format"),
        (["images", "--output", "s.JSON", "--format", "csv"], "--format csv: the suffix decides the format"),
        (["images", "--output", "-", "--format", "coco"], "--output - writes CSV"),
        (["images", "--output", "-", "--resume"], "--output - writes CSV"),
        (["images", "--output", "-", "--report"], "--output - writes CSV"),
        (["images", "--output", "-", "--cluster"], "--output - writes CSV"),
        (["images", "--resume", "--overwrite"], "give one of them"),
        (["images", "--streams", "2"], "--streams and --cuda-graph need a --provider"),
        (["images", "--provider", "cpu", "--cuda-graph"], "--streams and --cuda-graph need a --provider"),
        (["images", "--provider", "openvino", "--cuda-graph"], "--cuda-graph needs --provider"),
        (["images", "--provider", "cpu", "--compute-precision", "bf16"], "--compute-precision bf16"),
        (["images", "--compute-precision", "f32"], "'f32' is not one of"),
        (["images", "--max-megapixels", "nan"], "--max-megapixels nan: expected"),
        (["images", "--max-megapixels", "1e-9"], "--max-megapixels 1e-09: expected at least 1e-06"),
        (["images", "--model", "unruly.onnx"], "has no rules, as its network was never validated"),
        (["images", "--max-megapixels", "inf"], "not in the range"),
        (["empty"], "holds no images"),
        (["images", "images"], "share the key"),
        ([], "Missing argument"),
    ],
)
def test_what_cannot_run_is_status_2_and_one_line(
    images: Path, model: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "images.csv").mkdir()
    tiny_artifact(tmp_path / "unruly.onnx", (64, 96), LABELS, rules=())
    (tmp_path / "model.onnx").write_bytes(model.read_bytes())
    result = run(*words)
    assert result.exit_code == 2
    assert said in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert left(tmp_path) == ["empty", "images.csv", "model.onnx", "unruly.onnx"]


def test_oversized_images_are_failures(images: Path, model: Path, tmp_path: Path) -> None:
    result = run(images, "--model", model, "--max-megapixels", "0.01")
    assert result.exit_code == 1
    assert "oversized" in (tmp_path / "submission.failures.csv").read_text()


def test_a_report_lies_beside_the_submission(images: Path, model: Path, tmp_path: Path) -> None:
    (images / "z.jpg").write_text("not an image")
    result = run(images, "--model", model, "--output", "out/s.csv", "--report")
    assert result.exit_code == 1
    assert left(tmp_path / "out") == ["s.csv", "s.failures.csv", "s.html", "s.run.json"]
    page = (tmp_path / "out" / "s.html").read_text(encoding="utf-8")
    assert "a.jpg" in page
    assert "z.jpg" in page


@pytest.mark.parametrize(
    "words", [["-o", "x.parquet"], ["-o", "x.Parquet"], ["-o", "x.parquet", "--format", "parquet"]]
)
def test_the_suffix_decides_the_format(images: Path, model: Path, tmp_path: Path, words: list[str]) -> None:
    pytest.importorskip("pyarrow")
    assert run(images, "--model", model, "-o", "s.csv").exit_code == 0
    assert run(images, "--model", model, *words).exit_code == 0
    assert (tmp_path / words[1]).read_bytes()[:4] == b"PAR1"
    table = pd.read_parquet(tmp_path / words[1])
    rows = {(row.image, row.label): row.rle for row in table.itertuples()}
    assert rows == read_table(tmp_path / "s.csv", LABELS)


def test_statistics_are_written(images: Path, model: Path, tmp_path: Path) -> None:
    for number in range(6):
        write_jpeg(images / f"{number}.jpg", number)
    (images / "bad.jpg").write_bytes(b"no image")
    words = (images, "-m", model, "--stats", "stats.json", "--provider", "cpu", "--batch-size", "4")
    done = run(*words)
    assert done.exit_code == 1, done.output
    values = json.loads((tmp_path / "stats.json").read_text())
    assert (values["images"], values["failed"], values["identity"]["batch_size"]) == (10, 1, 4)
    assert [values["stages"][name]["count"] for name in ("decode", "infer", "postprocess")] == [10, 3, 9]
    assert values["limiting_stage"] in values["stages"]
    for stage in values["stages"].values():
        latency = stage["latency_ms"]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
        assert stage["busy_s"] <= stage["threads"] * values["elapsed_s"] * 1.01
    assert "bottleneck" in done.output


def test_standard_output_is_the_csv_and_nothing_else(images: Path, model: Path, tmp_path: Path) -> None:
    (images / "wölk, chen.jpg").write_bytes((images / "a.jpg").read_bytes())
    (images / "z.jpg").write_text("not an image")
    assert run(images, "--model", model, "-o", "s.csv").exit_code == 1
    before = left(tmp_path)
    result = run(images, "--model", model, "-o", "-", "--format", "csv")
    assert result.exit_code == 1
    assert result.stdout_bytes == (tmp_path / "s.csv").read_bytes()
    assert "standard output: 5 images" in result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("z.jpg,")]  # why it failed
    assert left(tmp_path) == before


def test_quiet_prints_errors_alone(images: Path, model: Path) -> None:
    result = run(images, "--model", model, "--quiet", "-o", "-")
    assert result.exit_code == 0
    assert result.stdout.startswith(HEADER)
    assert result.stderr == ""
    (images / "z.jpg").write_text("not an image")
    result = run(images, "--model", model, "--quiet")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "submission.failures.csv lists the failed images and the reasons" in result.stderr


def test_the_command_loads_nothing_heavy_before_it_runs() -> None:
    code = (
        "import sys; import cloudrt.cli.infer; "
        "print({'torch', 'onnx', 'onnxruntime', 'numba', 'pandas', 'cv2', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
