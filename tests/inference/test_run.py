"""`cloudrt.infer`: what the command does, from Python."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.tiny import SMALL_GRIDS, tiny_artifact, write_jpeg

import cloudrt
from cloudrt.cli.infer import infer
from cloudrt.errors import ArtifactError, DataError
from cloudrt.inference.task import RunSummary
from cloudrt.masks.table import read_table

IMAGES = 9


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(IMAGES - 1):
        write_jpeg(folder / f"{number}.jpg", number)
    (folder / "bad.jpg").write_bytes(b"no image")
    return folder


class Progress:
    """Records what is shown."""

    def __init__(self) -> None:
        self.opened: list[tuple[str, int]] = []
        self.done: list[dict[str, Any]] = []
        self.closed = False

    @contextmanager
    def __call__(self, description: str, total: int) -> Iterator[Any]:
        self.opened.append((description, total))
        try:
            yield lambda **fields: self.done.append(fields)
        finally:
            self.closed = True


def test_it_writes_the_bytes_of_the_command(images: Path, model: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    words = [str(images), "-m", str(model), "-o", str(said / "s.csv"), "--provider", "cpu", "--batch-size", "4"]
    words += ["--threads", "2", "--report", "--stats", str(said / "stats.json"), "--masks", str(said / "masks")]
    assert CliRunner().invoke(infer, words).exit_code == 1
    called, progress = tmp_path / "called", Progress()
    summary = cloudrt.infer(
        images,
        called / "s.csv",
        model,
        progress=progress,
        provider="cpu",
        batch_size=4,
        threads=2,
        report=True,
        stats=called / "stats.json",
        masks=called / "masks",
    )
    masks = [f"masks/{label}/{number}.jpg.png" for label in SMALL_GRIDS.classes for number in range(IMAGES - 1)]
    for name in ("s.csv", "s.failures.csv", "s.run.json", *masks):
        assert (called / name).read_bytes() == (said / name).read_bytes(), name
    assert sorted(path.name for path in called.iterdir()) == sorted(path.name for path in said.iterdir())

    rows = read_table(called / "s.csv", SMALL_GRIDS)
    filled = sum(map(bool, rows.values()))
    assert isinstance(summary, RunSummary)
    assert (summary.images, summary.failed, summary.rows_with_mask, summary.resumed) == (IMAGES, 1, filled, 0)
    assert (summary.output, summary.failures, summary.report) == (
        called / "s.csv",
        called / "s.failures.csv",
        called / "s.html",
    )
    assert not summary.already_finished
    assert summary.images_per_second == pytest.approx(IMAGES / summary.seconds)
    assert (summary.plan.provider, summary.plan.batch_size) == ("cpu", 4)
    stats = json.loads((called / "stats.json").read_text())
    assert (stats["images"], stats["failed"], stats["masks"]) == (IMAGES, 1, filled)
    assert stats["identity"] == json.loads((called / "s.run.json").read_text())["identity"]

    assert progress.opened == [("Segmenting", IMAGES)]
    assert len(progress.done) == IMAGES and progress.done[-1]["failed"] == 1
    assert progress.closed


def test_inputs_and_paths_are_texts_or_paths(images: Path, model: Path, tmp_path: Path) -> None:
    one = cloudrt.infer(str(images / "0.jpg"), str(tmp_path / "a.csv"), str(model), provider="cpu")
    assert (one.images, one.failed, one.failures, one.report) == (1, 0, None, None)
    sample = tmp_path / "sample.csv"
    sample.write_text("Image_Label,EncodedPixels\n1.jpg_Fish,\n0.jpg_Fish,\n")
    two = cloudrt.infer(
        [images / "0.jpg", str(images / "1.jpg")],
        tmp_path / "b.csv",
        model,
        provider="cpu",
        sample=str(sample),  # type: ignore[arg-type]
        stats=str(tmp_path / "stats.json"),  # type: ignore[arg-type]
    )
    assert two.images == 2
    first, second = (read_table(tmp_path / name, SMALL_GRIDS) for name in ("a.csv", "b.csv"))
    assert [name for name, label in second if label == "Fish"] == ["1.jpg", "0.jpg"]
    assert first.items() <= second.items()
    assert (tmp_path / "stats.json").is_file()


def test_defaults_of_model_output_and_provider(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """./model.onnx, submission.csv, `auto`; and existing files are replaced only on request."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").write_bytes(model.read_bytes())
    summary = cloudrt.infer(images)
    assert summary.output == Path("submission.csv")
    assert summary.plan.provider in cloudrt.options.PROVIDERS[1:]
    with (tmp_path / "submission.failures.csv").open(newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)] == ["bad.jpg"]
    with pytest.raises(DataError, match=r"submission\.csv exists: give another `output`, or `overwrite=True`"):
        cloudrt.infer(images)
    again = cloudrt.infer(images, resume=True)
    assert again.already_finished
    assert (again.images, again.resumed, again.images_per_second) == (IMAGES, IMAGES, 0.0)
    assert not cloudrt.infer(images, overwrite=True).already_finished


def test_formats(images: Path, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    cloudrt.infer(images, tmp_path / "s.parquet", model, provider="cpu")
    assert (tmp_path / "s.parquet").read_bytes().startswith(b"PAR1")
    cloudrt.infer(images, tmp_path / "t.json", model, provider="cpu", format="coco")
    assert len(json.loads((tmp_path / "t.json").read_text())["images"]) == IMAGES
    for output, form, named in (
        ("u.parquet", "csv", "the suffix decides the format"),
        ("u.txt", "", "the suffix decides the format"),
        ("u.csv", "cvs", "no format named 'cvs'; known: coco, csv, "),
    ):
        with pytest.raises(DataError, match=named):
            cloudrt.infer(images, tmp_path / output, model, provider="cpu", format=form)
    assert not list(tmp_path.glob("u*"))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"reprot": True}, "no option named 'reprot'; did you mean report"),
        ({"batchsize": 4}, "no option named 'batchsize'; did you mean batch_size"),
        ({"inputs_": 4}, "no option named 'inputs_'"),
        ({"batch_size": -4}, "batch_size must be a whole number"),
        ({"provider": "cudda"}, "no provider named 'cudda'; did you mean cuda"),
        ({"resume": True, "overwrite": True}, "give one of them"),
        ({"resume": True, "save_probabilities": "p.npz"}, "cannot be combined with `resume`"),
        ({"save_probabilities": "p.csv"}, "must end in .npz"),
    ],
)
def test_wrong_options_are_refused_before_anything(
    images: Path, model: Path, tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(DataError) as caught:
        cloudrt.infer(images, tmp_path / "s.csv", model, **settings)
    assert named in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_caller_leaves_the_journal(images: Path, model: Path, tmp_path: Path) -> None:
    """An exception of a callback during the run: a later run continues."""

    @contextmanager
    def broken(_description: str, _total: int) -> Iterator[Any]:
        def advance(**_: object) -> None:
            raise LookupError("the caller's own")

        yield advance

    with pytest.raises(LookupError, match="the caller's own"):
        cloudrt.infer(images, tmp_path / "s.csv", model, progress=broken, provider="cpu", batch_size=1)
    assert [path.name for path in tmp_path.iterdir()] == ["s.csv.journal"]
    cloudrt.infer(images, tmp_path / "s.csv", model, resume=True)
    cloudrt.infer(images, tmp_path / "t.csv", model, provider="cpu", batch_size=1)
    assert (tmp_path / "s.csv").read_bytes() == (tmp_path / "t.csv").read_bytes()


def test_a_model_that_cannot_predict_is_refused_before_anything(images: Path, tmp_path: Path) -> None:
    unruly = tiny_artifact(tmp_path / "unruly.onnx", (64, 96), SMALL_GRIDS, rules=())
    for path, named in ((unruly, "has no rules"), (tmp_path / "gone.onnx", "is missing")):
        with pytest.raises(ArtifactError, match=named):
            cloudrt.infer(images, tmp_path / "s.csv", path)
    assert [path.name for path in tmp_path.iterdir()] == ["unruly.onnx"]
