"""`cloudrt tune`: the reported Dice is that of inference with the new rules; rules that are kept."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from support import reference
from support.tiny import SMALL_GRIDS, tiny_artifact
from support.tuning import IMAGES, SIZE, run

from cloudrt.images.image import ImageFile
from cloudrt.inference.pipeline import Segmenter
from cloudrt.inference.submission import open_submission
from cloudrt.masks.metric import score
from cloudrt.masks.rle import rle_decode
from cloudrt.masks.rule import Rule
from cloudrt.model.artifact import read_artifact
from cloudrt.model.onnx_file import load_model
from cloudrt.reports import tune_page


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
    assert "--image-list" in result.stderr  # a warning, because all images are used
    page = output.with_suffix(".html").read_text()
    for word in (*SMALL_GRIDS.classes, f"{after:.4f}", f"{before:.4f}", "data:image/png;base64,"):
        assert word in page
    assert "http://" not in page and "https://" not in page
    picture = cv2.imread(str(output.with_suffix(".png")))
    assert picture is not None and min(picture.shape[:2]) > 500


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


def test_overwrite_changes_a_model_in_place(data: Path, tmp_path: Path) -> None:
    model = tiny_artifact(tmp_path / "m.onnx", SIZE, SMALL_GRIDS, rules=())
    run(model, data, "-o", model, "--overwrite", "--provider", "cpu")
    assert len(read_artifact(model).rules) == 3
