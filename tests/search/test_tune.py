"""`cloudrt tune`: the reported Dice is that of inference with the new rules; rules that are kept; errors."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from click.testing import Result
from support import reference
from support.commands import invoke
from support.tiny import SMALL_GRIDS, tiny_artifact, write_jpeg

from cloudrt.cli.tune import tune
from cloudrt.images.image import ImageFile
from cloudrt.inference.pipeline import Segmenter
from cloudrt.inference.submission import open_submission
from cloudrt.masks.metric import score
from cloudrt.masks.postprocess import apply_rules
from cloudrt.masks.rle import rle_decode
from cloudrt.masks.rule import Rule
from cloudrt.model.artifact import read_artifact
from cloudrt.model.onnx_file import artifact_bytes, load_model
from cloudrt.reports import tune_page
from cloudrt.search import tune as search_rules
from cloudrt.search.probabilities import write_probabilities

SIZE = (64, 96)
IMAGES = 9
GOOD = (Rule(150, 40), Rule(90, 100), Rule(120, 5))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("model") / "model.onnx", SIZE, SMALL_GRIDS, rules=(Rule(10, 0),) * 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Scenes whose truth is the model's mask with `GOOD`, eroded by one pixel; every third image has no Fish."""
    root = tmp_path_factory.mktemp("data")
    (root / "data.json").write_text(json.dumps(SMALL_GRIDS.to_dict()))
    files = [write_jpeg(root / "train_images" / f"{seed}.jpg", seed, (120, 180)) for seed in range(IMAGES)]
    rows = ["Image_Label,EncodedPixels"]
    with Segmenter(model, provider="cpu") as segmenter:
        for n, inferred in enumerate(segmenter.infer(files)):
            assert inferred.probability is not None
            for label, text in zip(SMALL_GRIDS.classes, apply_rules(inferred.probability, GOOD), strict=True):
                mask = cv2.erode(np.ascontiguousarray(rle_decode(text, (60, 90))), np.ones((3, 3), np.uint8))
                mask *= not (label == "Fish" and n % 3 == 0)
                large = mask.repeat(2, axis=0).repeat(2, axis=1)
                rows.append(f"{inferred.image}_{label},{reference.rle_encode(large)}")
    (root / "train.csv").write_text("\n".join(rows) + "\n")
    return root


def run(*words: str | Path, status: int = 0) -> Result:
    return invoke(tune, *words, status=status)


def scored(model: Path, data: Path, folder: Path) -> float:
    """Return the mean Dice of a submission for the training images."""
    files = [ImageFile(path.name, path) for path in sorted((data / "train_images").iterdir())]
    with Segmenter(model, provider="cpu") as segmenter, open_submission(folder / "s.csv", SMALL_GRIDS) as submission:
        for result in segmenter.predict(files):
            submission.add(result.image, result.rle, result.error)
    return score(folder / "s.csv", data / "train.csv", SMALL_GRIDS).mean


def test_what_is_reported_is_what_inference_then_scores(model: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "tuned.onnx"
    result = run(model, data, "-o", output, "--provider", "cpu")
    tuned = read_artifact(output)
    after, before = scored(output, data, tmp_path), scored(model, data, tmp_path)
    assert after > before + 0.02
    assert f"{after:.4f}" in result.stdout
    assert f"{before:.4f}" in result.stdout
    assert tuned.tuning["dice"] == pytest.approx(after, abs=1e-12)
    assert tuned.tuning["images"] == IMAGES
    assert tuned.validation_dice == tuned.tuning["out_of_fold_dice"] <= after + 0.05
    assert load_model(output).graph == load_model(model).graph
    assert read_artifact(model).rules == (Rule(10, 0),) * 3  # the model itself is left alone
    for label in SMALL_GRIDS.classes:
        assert label in result.stdout
    assert "--image-list" in result.stderr  # all images: a warning
    page = output.with_suffix(".html").read_text()
    for word in (*SMALL_GRIDS.classes, f"{after:.4f}", f"{before:.4f}", "data:image/png;base64,"):
        assert word in page
    assert "http://" not in page and "https://" not in page
    picture = cv2.imread(str(output.with_suffix(".png")))
    assert picture is not None and min(picture.shape[:2]) > 500


def test_a_model_that_is_replaced_meanwhile_does_not_get_the_rules(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other network has the same metadata."""
    mine, output = tmp_path / "m.onnx", tmp_path / "t.onnx"
    shutil.copy(model, mine)
    other = load_model(model)
    next(one for one in other.graph.initializer if one.name == "bias").raw_data = bytes(12)
    search = search_rules.tune

    def replaced(*given: Any, **named: Any) -> search_rules.Tuned:
        mine.write_bytes(artifact_bytes(other))
        return search(*given, **named)

    monkeypatch.setattr(search_rules, "tune", replaced)
    result = run(mine, data, "-o", output, "--provider", "cpu", status=2)
    assert "m.onnx was replaced while its rules were searched" in result.stderr
    assert not output.exists()


def test_only_values_that_rose_are_bold(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(tune_page, "write_tune_page", lambda *given: seen.append(given))
    run(model, data, "-o", tmp_path / "t.onnx", "--provider", "cpu")
    monkeypatch.undo()
    ((tuned, plot, facts, path),) = seen
    choices = [replace(choice, found=choice.rule) for choice in tuned.choices]  # none is kept
    for value, bold in ((0.0, len(choices)), (1.0, 0)):
        before = [(rule, replace(score, dice=value)) for rule, score in tuned.before]
        tune_page.write_tune_page(replace(tuned, before=before, choices=choices), plot, facts, path)
        assert path.read_text(encoding="utf-8").count('<td class="better">') == bold


def test_kept_probabilities_give_the_same_bytes(model: Path, data: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.npz"
    run(model, data, "-o", tmp_path / "a.onnx", "--save-probabilities", kept, "--provider", "cpu")
    run(kept, data, "--model", model, "-o", tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    run(kept, data, "-o", tmp_path / "rules.json")
    names = tmp_path / "names.txt"
    names.write_text("3.jpg\n5.jpg\n")
    run(model, data, "--image-list", names, "-o", tmp_path / "c.onnx", "--save-probabilities", tmp_path / "two.npz")
    # The images of the file, not all of train.csv.
    result = run(tmp_path / "two.npz", data, "-o", tmp_path / "two.json")
    assert "Mean Dice of 2 images" in " ".join(result.stdout.split())
    rules = json.loads((tmp_path / "rules.json").read_text())
    found = read_artifact(tmp_path / "a.onnx").rules
    previous = Rule(10, 0)
    for label, rule in zip(SMALL_GRIDS.classes, found, strict=True):
        assert rule in (Rule.from_dict(rules[label]), previous)
    assert found != (previous,) * 3
    with np.load(kept) as archive:  # numpy reads it too
        assert archive["maps/3.jpg"].shape == (3, 90, 60)


def test_images_whose_label_and_prediction_disagree_are_listed(model: Path, data: Path, tmp_path: Path) -> None:
    """Two labels are the opposite of what the network predicts; the losses are those of a plain loop."""
    wrong = tmp_path / "wrong"
    shutil.copytree(data, wrong)
    table = (wrong / "train.csv").read_text().splitlines()
    with Segmenter(model, provider="cpu") as segmenter:
        levels = {one.image: one.probability for one in segmenter.infer(sorted((wrong / "train_images").iterdir()))}
    swapped = [table[2].split(",")[0], table[11].split(",")[0]]
    for number, line in enumerate(table):
        key = line.split(",")[0]
        if key in swapped:
            image, label = key.rsplit("_", 1)
            found = levels[str(wrong / "train_images" / image)]
            assert found is not None
            mask = (found[SMALL_GRIDS.classes.index(label)].T < 128).astype(np.uint8)
            table[number] = f"{key},{reference.rle_encode(mask.repeat(2, axis=0).repeat(2, axis=1))}"
    (wrong / "train.csv").write_text("\n".join(table) + "\n")
    run(model, wrong, "-o", tmp_path / "t.onnx", "--provider", "cpu")
    with (tmp_path / "t.disagreements.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {f"{row['image']}_{row['class']}" for row in rows[:2]} == set(swapped)
    assert len(rows) == IMAGES * len(SMALL_GRIDS.classes)
    losses = [float(row["loss"]) for row in rows]
    assert losses == sorted(losses, reverse=True)
    truth = {key: rle_decode(text, (120, 180)) for key, text in (line.split(",") for line in table[1:])}
    for row in rows:
        mask = truth[f"{row['image']}_{row['class']}"][::2, ::2]
        found = levels[str(wrong / "train_images" / row["image"])]
        assert found is not None
        chance = (found[SMALL_GRIDS.classes.index(row["class"])].T + 0.5) / 256
        wanted = -np.log(np.where(mask, chance, 1 - chance)).mean()
        assert float(row["loss"]) == pytest.approx(wanted, abs=1e-4)
        assert float(row["labelled"]) == pytest.approx(mask.mean(), abs=1e-4)
    page = (tmp_path / "t.html").read_text(encoding="utf-8")
    assert "Largest disagreements between label and prediction" in page and swapped[0].rsplit("_", 1)[0] in page


def test_images_are_chosen_and_failures_listed(model: Path, data: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("1.jpg\r\n\n 4.jpg \n1.jpg\n7.jpg\n")
    result = run(model, data, "-o", tmp_path / "t.onnx", "--image-list", names, "--provider", "cpu")
    assert "Mean Dice of 3 images" in " ".join(result.stdout.split())
    assert "--image-list" not in result.stderr

    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("data.json", "train.csv"):
        (broken / name).write_bytes((data / name).read_bytes())
    (broken / "train_images").mkdir()
    for path in (data / "train_images").iterdir():
        content = path.read_bytes()
        if path.name != "2.jpg":
            (broken / "train_images" / path.name).write_bytes(
                content[: len(content) // 2] if path.name == "5.jpg" else content
            )
    result = run(model, broken, "-o", tmp_path / "u.onnx", "--provider", "cpu", status=1)
    assert read_artifact(tmp_path / "u.onnx").tuning["images"] == IMAGES - 2
    assert "2.jpg" in result.stderr and "5.jpg" in result.stderr
    assert "2 of 9 images were left out" in result.stderr
    assert "2.jpg" in (tmp_path / "u.html").read_text()


def test_given_thresholds_and_areas_alone_are_searched(model: Path, data: Path, tmp_path: Path) -> None:
    given = "--thresholds", "100:140:20,200", "--min-areas", "7,50"
    run(model, data, "-o", tmp_path / "t.json", "--provider", "cpu", *given)
    for values in json.loads((tmp_path / "t.json").read_text()).values():
        assert values["threshold"] in (10, 100, 120, 140, 200)  # 10 and 0 are those of the previous rule
        assert values["min_area"] in (0, 7, 50)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.onnx", "DATA"], "nowhere.onnx is missing"),
        (["nowhere.npz", "DATA"], "nowhere.npz is missing"),
        (["MODEL", "nowhere"], "train.csv is missing"),
        (["MODEL", "DATA", "-o", "out.txt"], "a .json with the rules alone"),
        (["MODEL", "DATA", "-o", "there.onnx"], "there.onnx exists"),
        (["MODEL", "DATA", "-o", "other.onnx"], "other.html exists"),
        (["MODEL", "DATA", "-o", "folder.onnx", "--overwrite"], "not a regular file"),
        (["MODEL", "DATA", "-o", "MODEL"], "would be replaced"),
        (["MODEL", "DATA", "--model", "MODEL"], "--model applies to PROBABILITIES"),
        (["KEPT", "DATA", "-o", "x.onnx"], "--model"),
        (["KEPT", "DATA", "--save-probabilities", "y.npz"], "stored already"),
        (["MODEL", "DATA", "--save-probabilities", "there.npz"], "there.npz exists"),
        (["MODEL", "DATA", "-o", "CONFIG", "--overwrite"], "it is both data.json and --output"),
        (["MODEL", "DATA", "--save-probabilities", "LABELS"], "the file name must end in .npz"),
        (["MODEL", "NOIMAGES"], "9 were left out, first 0.jpg"),
        (["text.npz", "DATA"], "not a file of probabilities"),
        (["zip.npz", "DATA"], "not a file of probabilities"),
        (["cut.npz", "DATA"], "cut.npz"),
        (["MODEL", "DATA", "--image-list", "nowhere.txt"], "nowhere.txt"),
        (["MODEL", "DATA", "--image-list", "blank.txt"], "names no image"),
        (["MODEL", "DATA", "--image-list", "/dev/zero"], "has more than 268,435,456 bytes"),
        (["MODEL", "DATA", "--image-list", "binary.txt"], "not a list in UTF-8"),
        (["MODEL", "DATA", "--image-list", "unknown.txt"], "no row of unknown.jpg"),
        (["MODEL", "DATA", "--image-list", "one.txt"], "at least two images"),
        (["MODEL", "OTHER"], "the data"),
        (["MODEL", "WRONG"], "1.jpg_Fish: RLE token 1"),
        (["MODEL", "DATA", "--thresholds", "256"], "256"),
        (["MODEL", "DATA", "--thresholds", "9:1"], "LAST is less than FIRST"),
        (["MODEL", "DATA", "--thresholds", "1:9:0"], "neither a whole number"),
        (["MODEL", "DATA", "--min-areas", "many"], "neither a whole number"),
        (["MODEL", "DATA", "--min-areas", "-1"], "neither a whole number"),
        (["MODEL", "DATA", "--min-areas", "0:2000000000"], "more than 10,000"),
        (["MODEL", "DATA", "--folds", "1"], "not in the range"),
    ],
)
def test_what_cannot_run_is_status_2_and_one_line(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "there.onnx": "",
        "there.npz": "",
        "other.html": "",
        "text.npz": "text",
        "blank.txt": "\n\n",
        "unknown.txt": "unknown.jpg\n",
        "one.txt": "1.jpg\n",
    }.items():
        Path(name).write_text(text)
    Path("binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    Path("folder.onnx").mkdir()
    with zipfile.ZipFile("zip.npz", "w") as archive:
        archive.writestr("other.npy", b"")
    with write_probabilities("kept.npz", SMALL_GRIDS) as writer:
        for n in range(IMAGES):
            writer.add(f"{n}.jpg", np.random.default_rng(n).integers(0, 256, (3, 90, 60), dtype=np.uint8))
    content = bytearray(Path("kept.npz").read_bytes())
    content[5000:5100] = bytes(100)
    Path("cut.npz").write_bytes(content)
    for folder, table in (
        ("other", "Image_Label,EncodedPixels\na.jpg_Fish,1 1\n"),
        ("wrong", "Image_Label,EncodedPixels\n1.jpg_Fish,0 1\n"),
    ):
        Path(folder, "train_images").mkdir(parents=True)
        Path(folder, "train.csv").write_text(table)
    Path("wrong", "data.json").write_bytes((data / "data.json").read_bytes())
    Path("wrong", "train_images", "1.jpg").write_bytes((data / "train_images" / "1.jpg").read_bytes())
    Path("noimages", "train_images").mkdir(parents=True)
    for name in ("train.csv", "data.json"):
        Path("noimages", name).write_bytes((data / name).read_bytes())
    before = sorted(path.name for path in tmp_path.iterdir())
    known: dict[str, str | Path] = {
        "LABELS": data / "train.csv",
        "CONFIG": data / "data.json",
        "NOIMAGES": "noimages",
        "MODEL": model,
        "DATA": data,
        "KEPT": "kept.npz",
        "OTHER": "other",
        "WRONG": "wrong",
    }
    result = run(*(known.get(word, word) for word in words), status=2)
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_previous_rules_that_are_as_good_are_kept(data: Path, tmp_path: Path) -> None:
    good = Rule(250, 0, gate_threshold=17, gate_pixels=1)  # the search tries other gates only
    model = tiny_artifact(tmp_path / "m.onnx", SIZE, SMALL_GRIDS, rules=(good, Rule(120, 0), Rule(10, 0)))
    levels = "--thresholds", "120,150", "--min-areas", "0,40"
    result = run(model, data, "-o", tmp_path / "t.onnx", "--provider", "cpu", *levels)
    kept = read_artifact(tmp_path / "t.onnx").rules
    assert kept[0] == good
    assert f"{SMALL_GRIDS.classes[0]} keeps its rule: the new rule (> " in result.stdout
    assert "keeps its rule" in (tmp_path / "t.html").read_text()
    assert kept[2] != Rule(10, 0)
    assert f"{SMALL_GRIDS.classes[2]} keeps" not in result.stdout


def test_a_terminal_that_is_not_utf8(model: Path, data: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    words = ["tune", str(model), str(data), "-o", str(tmp_path / "t.onnx"), "--provider", "cpu"]
    script = ["-c", "import sys; from cloudrt.cli import main; main(sys.argv[1:])", *words]
    done = subprocess.run([sys.executable, *script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_an_image_without_a_row_is_not_replaced(model: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    images = tmp_path / "data" / "train_images"
    rows = (data / "train.csv").read_text().splitlines()
    (tmp_path / "data" / "train.csv").write_text("\n".join(row for row in rows if not row.endswith(",")) + "\n")
    picture = images / "extra.png"
    assert cv2.imwrite(str(picture), np.full((120, 180, 3), 30, np.uint8))
    before = picture.read_bytes()
    result = run(model, tmp_path / "data", "-o", images / "extra.onnx", "--overwrite", "--provider", "cpu", status=2)
    assert "extra.png is one of the images and would be replaced" in result.stderr
    assert picture.read_bytes() == before and not (images / "extra.onnx").exists()


def test_overwrite_changes_a_model_in_place(data: Path, tmp_path: Path) -> None:
    model = tiny_artifact(tmp_path / "m.onnx", SIZE, SMALL_GRIDS, rules=())
    run(model, data, "-o", model, "--overwrite", "--provider", "cpu")
    assert len(read_artifact(model).rules) == 3


def test_a_kill_while_writing_leaves_no_output(model: Path, data: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time; from cloudrt.cli import main\n"
        "def stop(*_): print('writing', flush=True); time.sleep(60)\n"
        "import cloudrt.system.files, os\n"
        "os.fsync = stop\n"
        "main(sys.argv[1:])"
    )
    words = ["tune", str(model), str(data), "-o", str(tmp_path / "t.onnx"), "--provider", "cpu"]
    command = [sys.executable, "-c", script, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        time.sleep(0.05)
        process.kill()
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


def npy(header: bytes, body: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


@pytest.mark.parametrize(
    "member",
    [
        b"",
        b"no array",
        npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (1152921504606846976,)}"),
        npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': ("),
        npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (3,)}", b"abc"),
        npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (-3,)}"),
        npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", bytes(4)),
    ],
    ids=["empty", "no array", "huge", "cut header", "objects", "negative", "floats"],
)
@pytest.mark.parametrize("name", ["labels.npy", "maps/1.jpg.npy"])
def test_invalid_probabilities_are_refused(data: Path, tmp_path: Path, member: bytes, name: str) -> None:
    with write_probabilities(tmp_path / "sound.npz", SMALL_GRIDS) as writer:
        for n in range(3):
            writer.add(f"{n}.jpg", np.zeros((3, 90, 60), np.uint8))
    with zipfile.ZipFile(tmp_path / "sound.npz") as sound, zipfile.ZipFile(tmp_path / "bad.npz", "w") as bad:
        for each in sound.namelist():
            bad.writestr(each, member if each == name else sound.read(each))
    result = run(tmp_path / "bad.npz", data, "-o", tmp_path / "r.json", status=2)
    assert len(result.stderr.strip().splitlines()) == 1
    assert "bad.npz" in result.stderr
    assert not (tmp_path / "r.json").exists()
