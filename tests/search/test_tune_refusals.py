"""What `cloudrt tune` refuses, in one line and without output, and what it never replaces."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from support.tiny import SMALL_GRIDS
from support.tuning import IMAGES, run

from cloudrt.data.folder import open_data
from cloudrt.errors import DataError
from cloudrt.model.inferred import Inferred
from cloudrt.model.onnx_file import artifact_bytes, load_model
from cloudrt.search import tune as search_rules
from cloudrt.search.probabilities import write_probabilities
from cloudrt.search.tune import TuneOptions
from cloudrt.search.tuned import Tuned
from cloudrt.system.progress import progress_bar


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"threads": "2"}, {"folds": 1}, {"folds": 2.5}])
def test_options_are_checked_before_an_image_is_read(data: Path, wrong: dict[str, Any]) -> None:
    class Maps:
        labels = open_data(data).labels

        def infer(self, _images: object) -> Iterator[Inferred]:
            raise AssertionError

    names = [path.name for path in (data / "train_images").iterdir()]
    with pytest.raises(DataError, match=f"{next(iter(wrong))} must be a whole number from"):
        search_rules.tune(Maps(), open_data(data), names, TuneOptions(**wrong), bar=progress_bar)


def test_a_model_that_is_replaced_meanwhile_does_not_get_the_rules(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other network has the same metadata."""
    mine, output = tmp_path / "m.onnx", tmp_path / "t.onnx"
    shutil.copy(model, mine)
    other = load_model(model)
    next(one for one in other.graph.initializer if one.name == "bias").raw_data = bytes(12)
    search = search_rules.tune

    def replaced(*given: Any, **named: Any) -> Tuned:
        mine.write_bytes(artifact_bytes(other))
        return search(*given, **named)

    monkeypatch.setattr(search_rules, "tune", replaced)
    result = run(mine, data, "-o", output, "--provider", "cpu", status=2)
    assert "m.onnx was replaced while its rules were searched" in result.stderr
    assert not output.exists()


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
