"""Commands that would replace their input or, without --overwrite, what exists are refused before they start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.files import contents
from support.tiny import tiny_artifact

from cloudrt.cli import main
from cloudrt.errors import DataError


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """A data set, a model, a checkpoint, and outputs of earlier runs."""
    root = tmp_path_factory.mktemp("workshop")
    shutil.copytree(scenes, root / "data")
    tiny_artifact(root / "model.onnx")
    trained = ("best.pth", "runs/old/best.pth", "runs/folds/fold-0/best.pth", "runs/stray/held_out.txt")
    others = ("bench.json", "page/x.html", "repository/cloudrt/1/old.onnx", "repository/other/config.pbtxt")
    for place in (*trained, *others):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_text("of an earlier run")
    return root


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("export best.pth", "model.onnx exists: give another --output, or --overwrite"),
        ("export best.pth -o bench.json", "bench.json exists"),
        ("export best.pth -o new.onnx --stats bench.json", "bench.json exists: give another --stats"),
        ("export best.pth -o new.onnx --triton repository", "repository/cloudrt is not empty: give another --triton"),
        ("export best.pth -o model.onnx --precision all --stats model.FP16.onnx", "both --stats and the fp16 artifact"),
        ("export best.pth -o r/cloudrt/1/Model.onnx --triton r", "both the fp16 artifact and model.onnx of --triton"),
        ("export best.pth -o link.onnx --overwrite", "both checkpoint 1 and the fp16 artifact"),
        ("export best.pth -o new.onnx --stats IMAGE --data data/train_images --overwrite", "is one of the images"),
        ("bench model.onnx -o bench.json", "bench.json exists: give another --output, or --overwrite"),
        ("bench model.onnx -o page/x.json", "page/x.html exists"),
        ("bench model.onnx -o model.json --overwrite", "both MODEL 1 and --output"),
        ("bench -o model.json --overwrite", "both the model and --output"),
        ("bench --data data/train_images -o image.json --overwrite", "is one of the images"),
        ("explore data -o new/", "--output new: the file name must end in .html"),
        ("explore data -o -", "--output -: the file name must end in .html"),
        ("explore data --findings f.html", "--findings f.html: the file name must end in .csv"),
        ("bench model.onnx -o new/", "--output new: the file name must end in .json"),
        ("bench model.onnx -o new.txt", "--output new.txt: the file name must end in .json"),
        ("export best.pth -o new/", "--output new: the file name must end in .onnx"),
        ("export best.pth -o new.onnx --stats new.csv", "--stats new.csv: the file name must end in .json"),
        ("tune model.onnx data -o new/", "new: the output must be an .onnx, or a .json"),
        ("tune model.onnx data -o -", "-: the output must be an .onnx, or a .json"),
        ("grid days.zarr -o new/", "new: the name must end in .nc or .zarr"),
        ("infer data/test_images -m model.onnx -o new/", "--output new: the suffix decides the format: .csv (csv)"),
        ("infer data/test_images -m model.onnx -o new", "--output new: the suffix decides the format"),
        ("infer data/test_images -m model.onnx -o new.txt --cluster", "new.txt: the suffix decides the format"),
        ("infer data/test_images -m model.onnx -o s.csv --format coco --cluster", "and --format coco: the suffix"),
        ("infer data/test_images -m model.onnx --masks data/test_images/m", "(--masks) lies in"),
        ("infer data/**/*.jpg -m model.onnx --overlays data/new", "(--overlays) lies in"),
        ("tune model.onnx data -o data/train_images/new.json", "(the plot of --output) lies in"),
        ("train data --runs data/test_images/runs --name new", "(--runs) lies in"),
        ("synth data", "data is not empty: give another OUT"),
        ("synth best.pth", "best.pth (OUT) is not a folder"),
        ("train data --name old", "runs/old contains a run: use --resume, another --name, or --overwrite"),
        ("train data --name stray", "held_out.txt exists: give another --name, or --overwrite"),
        ("train data --name old --init runs/old/best.pth --overwrite", "both --init and best.pth of --name"),
        ("train data --name old --encoder-weights runs/old/best.pth --overwrite", "both --encoder-weights and"),
        ("train data --name folds --folds 2 --init runs/folds/fold-0/best.pth --overwrite", "both --init and"),
        ("train runs/nested/fold-1 --name nested --folds 2 --overwrite", "contains input images"),
        ("explore data -o page/x.html", "page/x.html exists: give another --output, or --overwrite"),
        ("explore data --findings data/train.csv --overwrite", "both train.csv and --findings"),
        ("tune model.onnx data -o model.onnx", "both the model and --output"),
        ("tune p.npz data --model in/p.onnx -o in/p.onnx --overwrite", "both the model and the page of --output"),
        ("tune model.onnx data --save-probabilities to_csv.npz --overwrite", "both train.csv and --save-probabilities"),
    ],
)
def test_what_would_be_replaced_is_refused(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, said: str
) -> None:
    root = tmp_path / "here"
    shutil.copytree(workshop, root)
    monkeypatch.chdir(root)
    (root / "link.onnx").hardlink_to(root / "best.pth")
    (root / "to_csv.npz").symlink_to("data/train.csv")
    (root / "p.npz").touch()
    (root / "in").mkdir()
    (root / "in" / "p.onnx").hardlink_to(root / "model.onnx")
    (root / "in" / "p.html").symlink_to(root / "p.npz")
    shutil.copytree(root / "data", root / "runs" / "nested" / "fold-1")
    image = sorted((root / "data" / "train_images").iterdir())[0]
    (root / "model.json").symlink_to("model.onnx")
    (root / "image.json").symlink_to(image)
    before = contents(root)
    done = CliRunner().invoke(main, words.replace("IMAGE", str(image.relative_to(root))).split())
    assert (done.exit_code, said in done.output) == (2, True), done.output
    assert contents(root) == before


def test_benchmarks_without_a_name_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outputs = []

    def measured(_options: object, output: Path, _bar: object) -> object:
        outputs.append(output.name)
        output.with_suffix(".html").touch()
        raise DataError("measured")

    monkeypatch.setattr("cloudrt.bench.measure.bench", measured)
    for words in ("bench", "bench", "bench --overwrite", "bench"):
        assert "measured" in CliRunner().invoke(main, words.split()).output
    Path("bench-4.json").touch()
    CliRunner().invoke(main, ["bench"])
    assert outputs == ["bench.json", "bench-2.json", "bench.json", "bench-3.json", "bench-5.json"]


def test_a_triton_repository_with_other_models_is_accepted(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cloudrt.export.request import ExportRequest

    monkeypatch.chdir(workshop)
    shutil.copytree("repository/other", tmp_path / "repository" / "other")
    request = {"checkpoints": (Path("best.pth"),), "output": tmp_path / "new.onnx"}
    assert ExportRequest(**request, triton=tmp_path / "repository").triton  # type: ignore[arg-type]
    assert ExportRequest(**request, triton=Path("repository"), overwrite=True).overwrite  # type: ignore[arg-type]
