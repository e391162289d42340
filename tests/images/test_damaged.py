"""The command on a folder of hundreds of damaged and unusual files: no crash, no hang, no wrong row."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from support.files import read_pairs
from support.pictures import FILES, encoded
from support.tiny import SMALL_GRIDS, tiny_artifact

from cloudrt.cli.infer import infer
from cloudrt.engines.choice import open_engine
from cloudrt.images.resize import resize
from cloudrt.masks.postprocess import apply_rules
from cloudrt.masks.table import read_table

SIZE = (96, 160)
"""Larger than the pictures: they are decoded at their full size, and what OpenCV reads is the reference."""


def damaged() -> Iterator[tuple[str, bytes]]:
    """Name and bytes of files, of which only some are sound."""
    draw = random.Random(11)
    jpeg, png, webp = encoded("JPEG"), encoded("PNG"), encoded("WEBP")
    ends = (0, 1, 2, 3, 4, 10, 20, 100, 160, 300, 600, len(jpeg) - 2, len(jpeg) - 1)
    for length in sorted({*ends, *range(700, len(jpeg), 250)}):
        yield f"cut at {length}.jpg", jpeg[:length]
    for length in (7, 8, 30, 40, len(png) // 2, len(png) - 1):
        yield f"cut at {length}.png", png[:length]
    for kind, content in (("jpg", jpeg), ("png", png), ("webp", webp)):
        for number in range(40):
            place = draw.randrange(len(content))
            bit = bytes([content[place] ^ 1 << draw.randrange(8)])
            yield f"bit {number}.{kind}", content[:place] + bit + content[place + 1 :]
    for number in range(20):
        begin, length = draw.randrange(200, len(jpeg) - 100), draw.randrange(1, 100)
        yield f"noise {number}.jpg", jpeg[:begin] + draw.randbytes(length) + jpeg[begin + length :]
        yield f"gap {number}.jpg", jpeg[:begin] + jpeg[begin + length :]
    for name, make in FILES.items():
        yield f"{name}.jpg", make()  # the content decides, not the suffix
    for number in range(10):
        yield f"only noise {number}.tiff", draw.randbytes(draw.randrange(1, 3000))
    start = jpeg.index(b"\xff\xc0")
    yield "60000 x 60000.jpg", jpeg[: start + 5] + struct.pack(">HH", 60_000, 60_000) + jpeg[start + 9 :]
    yield "60000 x 60000.png", png[:16] + struct.pack(">II", 60_000, 60_000) + png[24:]
    yield "arithmetic.jpg", jpeg[:start] + b"\xff\xc9" + jpeg[start + 2 :]
    yield "text.jpg", b"Image_Label,EncodedPixels\n"
    yield "zeros.jpg", bytes(10_000)
    yield "two pictures.jpg", jpeg + jpeg
    yield "gif.jpg", b"GIF89a" + bytes(100)
    yield "pdf.png", b"%PDF-1.7\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in")
    for name, content in damaged():
        (folder / name.replace("/", "-")).write_bytes(content)
    (folder / "a folder.jpg").mkdir()
    (folder / "a folder.jpg" / "inside, Wölkchen.jpg").write_bytes(encoded("JPEG"))
    if hasattr(os, "mkfifo"):
        (folder / "dangling.jpg").symlink_to(folder / "gone.jpg")
        (folder / "itself.jpg").symlink_to(folder / "itself.jpg")
        os.mkfifo(folder / "pipe.jpg")
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(folder / "socket.jpg"))
    return folder


@pytest.fixture(scope="module")
def output(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, and the submission and failures of its run."""
    output = tmp_path_factory.mktemp("out")
    model = tiny_artifact(output / "model.onnx", SIZE, SMALL_GRIDS)
    words = [folder, "-m", model, "-o", output / "s.csv", "--provider", "cpu", "--batch-size", "8"]
    done = CliRunner().invoke(infer, [str(word) for word in words])
    assert done.exit_code == 1, done.output
    return output


def test_every_file_is_a_failure_or_decoded_as_opencv_decodes_it(folder: Path, output: Path) -> None:
    rows = read_table(output / "s.csv", SMALL_GRIDS)
    keys = list(dict.fromkeys(key for key, _ in rows))
    assert len(keys) >= 250
    assert len(rows) == 3 * len(keys)
    failures = read_pairs(output / "s.failures.csv")
    assert set(failures) <= set(keys)
    assert all(failures.values())
    sound = [key for key in keys if key not in failures]
    assert len(sound) >= len(FILES)
    for key in failures:
        assert not any(rows[key, label] for label in SMALL_GRIDS.classes), key
    with open_engine(output / "model.onnx", "cpu", 1) as engine:
        for key in sound:
            picture = cv2.imread(str(folder / key), cv2.IMREAD_COLOR)
            assert picture is not None, key
            image = resize(np.ascontiguousarray(picture[:, :, ::-1]), SIZE)
            (levels,) = engine.probability(image[None])
            wanted = dict(zip(SMALL_GRIDS.classes, apply_rules(levels, engine.artifact.rules), strict=True))
            assert wanted == {label: rows[key, label] for label in SMALL_GRIDS.classes}, key


def test_what_must_fail_fails(folder: Path, output: Path) -> None:
    failures = read_pairs(output / "s.failures.csv")
    names = {path.name for path in folder.iterdir() if not path.is_dir() or path.is_symlink()}
    cut = {name for name in names if name.startswith("cut at")}
    assert len(cut) > 20
    certain = {f"60000 x 60000.{suffix}" for suffix in ("jpg", "png")}
    certain |= {"arithmetic.jpg", "text.jpg", "zeros.jpg", "gif.jpg", "pdf.png"}
    assert cut | certain <= set(failures)
    assert "megapixels" in failures["60000 x 60000.jpg"]
    if hasattr(os, "mkfifo"):
        assert {"dangling.jpg", "itself.jpg", "pipe.jpg", "socket.jpg"} <= set(failures)
        assert "not a regular file" in failures["pipe.jpg"]
