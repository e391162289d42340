"""Results in Python: one input or many, masks of any size, pictures, probabilities and tables."""

from __future__ import annotations

import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from support.tiny import SMALL_GRIDS, write_jpeg

import cloudrt
from cloudrt.images.decoding import Input
from cloudrt.images.image import decode

SIZE = (120, 180)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed in range(3):
        write_jpeg(folder / f"{seed}.jpg", seed, SIZE)
    return folder


@pytest.fixture(scope="module")
def segmenter(model: Path) -> cloudrt.Segmenter:
    return cloudrt.Segmenter(model, provider="cpu", batch_size=2, threads=1)


def test_one_input_gives_the_results_of_a_list(segmenter: cloudrt.Segmenter, images: Path) -> None:
    several = list(segmenter.predict(sorted(images.iterdir())))
    folder = list(segmenter.predict(str(images)))
    assert [one.image for one in folder] == ["0.jpg", "1.jpg", "2.jpg"]
    assert [one.rle for one in folder] == [one.rle for one in several]
    (path,) = segmenter.predict(images / "1.jpg")
    (content,) = segmenter.predict((images / "1.jpg").read_bytes())
    assert path.rle == content.rle == several[1].rle
    pixels = decode((images / "1.jpg").read_bytes())
    (array,) = segmenter.predict(pixels)
    assert [one.rle for one in segmenter.predict(np.stack([pixels, pixels]))] == [array.rle, array.rle]
    (inferred,) = segmenter.infer(images / "1.jpg")
    assert inferred.image == "1.jpg"


def test_images_of_other_libraries_are_arrays(segmenter: cloudrt.Segmenter, images: Path) -> None:
    torch = pytest.importorskip("torch")
    pixels = decode((images / "0.jpg").read_bytes())
    tensor = torch.from_numpy(pixels.copy())
    inputs = [pixels, Image.fromarray(pixels), tensor, tensor.permute(2, 0, 1), tensor[:, :, 0].float()]
    expected, *others, wrong = segmenter.predict(inputs)
    assert [one.rle for one in others] == [expected.rle] * 3
    assert [one.source for one in others] == [SIZE] * 3
    assert "float32" in str(wrong.error)
    (single,) = segmenter.predict(Image.fromarray(pixels).convert("L"))  # type: ignore[arg-type]
    assert single.error is None


def test_arrays_of_wrong_axes_are_refused_at_once(segmenter: cloudrt.Segmenter, images: Path) -> None:
    """Without this check, each row of a grey image would be taken for an image, and fail."""
    for wrong in (np.zeros((20, 30), np.uint8), np.zeros(5, np.float32), np.zeros((1, 2, 20, 30, 3), np.uint8)):
        with pytest.raises(cloudrt.DataError, match=r"must be .H, W, 3. or .N, H, W, 3. uint8 RGB, found"):
            segmenter.predict(wrong)
    paths = np.array([str(images / "0.jpg"), str(images / "1.jpg")])
    assert [one.error for one in segmenter.predict(paths)] == [None, None]


def test_an_image_that_pil_cannot_read_fails_alone(segmenter: cloudrt.Segmenter, images: Path) -> None:
    """PIL reads the pixels only when they are needed."""
    content = (images / "0.jpg").read_bytes()
    cut: Any = Image.open(BytesIO(content[: len(content) // 2]))
    (single,) = segmenter.predict(cut)
    broken, sound = segmenter.predict([cut, images / "1.jpg"])
    for result in (single, broken):
        assert "cannot be converted to an array: image file is truncated" in str(result.error)
        assert result.source is None
    assert sound.error is None and sound.source == images / "1.jpg"


def test_torch_pil_and_pandas_are_not_imported() -> None:
    script = (
        "import sys, cloudrt, numpy as np\n"
        "from cloudrt.images.image import to_array\n"
        "to_array(np.zeros((2, 2, 3), np.uint8)), cloudrt.Segmenter, cloudrt.Result\n"
        "print([name for name in ('torch', 'PIL', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_masks_have_the_size_that_is_asked_for(segmenter: cloudrt.Segmenter, images: Path) -> None:
    (result,) = segmenter.predict(images / "0.jpg")
    label = max(result.areas(), key=lambda name: result.areas()[name])
    grid = result.mask(label)
    assert grid.shape == (60, 90) and grid.sum() == result.areas()[label] > 0
    assert np.array_equal(result.mask(label, size="image"), grid.repeat(2, axis=0).repeat(2, axis=1))
    assert np.array_equal(result.mask(label, (180, 270)), grid.repeat(3, axis=0).repeat(3, axis=1))
    (array,) = segmenter.predict(decode((images / "0.jpg").read_bytes()))
    assert array.mask(label, "image").shape == SIZE
    (content,) = segmenter.predict((images / "0.jpg").read_bytes())
    for wrong, words in (
        ("image", "is not known"),
        ("large", "size must be"),
        ((0, 4), "size must be"),
        (5, "size must be"),
    ):
        with pytest.raises(cloudrt.DataError, match=words):
            content.mask(label, wrong)  # type: ignore[arg-type]
    with pytest.raises(cloudrt.DataError, match="no class named 'Fsh'; did you mean Fish"):
        content.mask("Fsh")


def test_the_pixel_limit_of_the_run_applies_when_the_file_is_read_again(model: Path, images: Path) -> None:
    with cloudrt.Segmenter(model, provider="cpu", batch_size=1, threads=1, max_pixels=SIZE[0] * SIZE[1]) as segmenter:
        (result,) = segmenter.predict(images / "0.jpg")
    label = next(iter(result.rle))
    assert result.mask(label, "image").shape == SIZE
    assert result.max_pixels == SIZE[0] * SIZE[1]
    result.max_pixels -= 1
    with pytest.raises(cloudrt.ImageError, match="is oversized"):
        result.mask(label, "image")
    with pytest.raises(cloudrt.ImageError, match="is oversized"):
        result.plot()


def test_results_are_drawn_and_saved(segmenter: cloudrt.Segmenter, images: Path, tmp_path: Path) -> None:
    (result,) = segmenter.predict(images / "0.jpg")
    picture = result.plot()
    plain = cloudrt.Result(
        result.image, dict.fromkeys(result.rle, ""), None, result.labels, source=result.source
    ).plot()
    assert picture.shape == plain.shape == (60, 90, 3) and picture.dtype == np.uint8
    on = np.max([result.mask(label) for label in result.rle], axis=0)
    away = cv2.dilate(on, np.ones((7, 7), np.uint8)) == 0
    away[:50] = False  # the names of the classes
    assert np.array_equal(picture[away], plain[away])
    assert (picture != plain).any(axis=2)[on > 0].mean() > 0.9
    result.save(tmp_path / "a.png")
    saved = cv2.imread(str(tmp_path / "a.png"))
    assert saved is not None and np.array_equal(saved[..., ::-1], picture)
    pixels = decode((images / "0.jpg").read_bytes())
    (array,) = segmenter.predict(pixels)
    assert array.plot(pixels).shape == picture.shape
    with pytest.raises(cloudrt.DataError, match="give its pixels"):
        array.plot()
    with pytest.raises(cloudrt.DataError, match="suffix decides"):
        result.save(tmp_path / "a.txt")
    (failed,) = segmenter.predict(b"no image")
    with pytest.raises(cloudrt.DataError, match="nothing to draw"):
        failed.plot()


def test_probabilities_are_those_of_the_network(segmenter: cloudrt.Segmenter, images: Path) -> None:
    inputs: list[Input] = [images / "0.jpg", b"no image", images / "1.jpg"]
    seen: list[str] = []
    results = list(segmenter.predict(inputs, lambda inferred: seen.append(inferred.image), probabilities=True))
    assert len(seen) == 3
    for result, inferred in zip(results, segmenter.infer(inputs), strict=True):
        if inferred.probability is None:
            assert result.probability is None
        else:
            assert result.probability is not None
            assert np.array_equal(result.probability, inferred.probability.transpose(0, 2, 1))
    assert next(segmenter.predict(inputs)).probability is None


def test_many_results_are_a_table(segmenter: cloudrt.Segmenter, images: Path) -> None:
    inputs: list[Input] = [images / "0.jpg", b"no image"]
    results = list(segmenter.predict(inputs))
    table = cloudrt.to_dataframe(results)
    assert list(table.columns) == ["image", "class", "rle", "pixels", "error"]
    assert len(table) == 2 * len(SMALL_GRIDS.classes)
    for row in table.itertuples(index=False):
        result = results[0 if str(row.image) == results[0].image else 1]
        assert row[2] == result.rle[row[1]]
        assert row[3] == result.mask(row[1]).sum()
    assert set(table[table.image == "image-1"].error) == {results[1].error}
    assert cloudrt.to_dataframe([]).empty
    assert cloudrt.to_dataframe(results[0]).rle.tolist() == table.rle[: len(SMALL_GRIDS.classes)].tolist()


def test_reprs_are_short(segmenter: cloudrt.Segmenter, images: Path) -> None:
    assert repr(segmenter) == f"Segmenter({str(segmenter.model)!r}, provider cpu, batch 2, 1 threads)"
    (result,) = segmenter.predict(images / "0.jpg", probabilities=True)
    (inferred,) = segmenter.infer(images / "0.jpg")
    assert all(len(repr(one)) < 200 for one in (result, inferred, segmenter))
