"""The pipeline: the results of a plain loop in order, failures of single images, options, and errors."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from support.plain import SIZE, picture, plain_answers
from support.tiny import SMALL_GRIDS, tiny_artifact, write_jpeg

from cloudrt.data.scenes import draw_scene
from cloudrt.errors import ArtifactError, DataError
from cloudrt.images.decoding import Input
from cloudrt.images.image import ImageFile, load_image
from cloudrt.inference.pipeline import Segmenter
from cloudrt.inference.results import Result
from cloudrt.masks.postprocess import apply_rules
from cloudrt.masks.rle import rle_decode
from cloudrt.masks.rule import Rule
from cloudrt.options import RunOptions

LABELS = SMALL_GRIDS


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[ImageFile]:
    folder = tmp_path_factory.mktemp("images")
    return [write_jpeg(folder / f"{seed}.jpg", seed) for seed in range(7)]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 16])
def test_answers_are_those_of_a_plain_loop(model: Path, files: list[ImageFile], batch_size: int) -> None:
    """At every batch size, with a padded last batch too."""
    with Segmenter(model, provider="cpu", batch_size=batch_size, threads=2) as segmenter:
        results = list(segmenter.predict(files))
        rules = segmenter.artifact.rules
    assert [result.image for result in results] == [file.key for file in files]
    for file, result in zip(files, results, strict=True):
        assert result.error is None
        assert result.rle == plain_answers(model, load_image(file.path, SIZE), rules)
    assert sum(bool(text) for result in results for text in result.rle.values()) > len(files)


def test_paths_bytes_and_arrays_are_inputs(model: Path, files: list[ImageFile]) -> None:
    path = files[0].path
    image = load_image(path, SIZE)
    strided = image[..., ::-1].copy()[..., ::-1]
    assert not strided.flags.c_contiguous
    inputs: list[Input] = [path, str(path), path.read_bytes(), image, strided, files[0]]
    with Segmenter(model, provider="cpu") as segmenter:
        results = list(segmenter.predict(inputs))
        assert list(segmenter.predict([])) == []
    assert [result.image for result in results] == [str(path), str(path), "image-2", "image-3", "image-4", "0.jpg"]
    assert all(result.rle == results[0].rle for result in results)


def test_presence_and_gates_decide(tmp_path: Path) -> None:
    rules = (Rule(127, 0, presence=255), Rule(127, 0, gate_threshold=200, gate_pixels=60 * 90), Rule(127, 0))
    model = tiny_artifact(tmp_path / "m.onnx", SIZE, LABELS, presence=True, rules=rules)
    with Segmenter(model, provider="cpu") as segmenter:
        bright, dark = segmenter.predict([picture(255), picture(100)])
    assert bright.rle["Fish"]
    assert bright.rle["Flower"] == ""
    assert bright.rle["Gravel"]
    assert dark.rle["Gravel"] == ""


def test_a_result_gives_its_masks(model: Path) -> None:
    with Segmenter(model, provider="cpu") as segmenter:
        (result,) = segmenter.predict([picture(200)])
    mask = result.mask("Fish")
    assert mask.shape == LABELS.submit_grid
    assert (mask == rle_decode(result.rle["Fish"], LABELS.submit_grid)).all()
    assert 0 < mask.mean() < 1
    with pytest.raises(DataError, match="Fisch"):
        result.mask("Fisch")


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_failures_stay_alone(model: Path, files: list[ImageFile], tmp_path: Path, batch_size: int) -> None:
    whole = files[1].path.read_bytes()
    bad = {
        "cut.jpg": whole[: len(whole) // 2],
        "text.jpg": b"not an image at all\n",
        "empty.jpg": b"",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    failing = [ImageFile(name, tmp_path / name) for name in [*bad, "missing.jpg"]]
    inputs: list[Input] = [files[0], failing[0], files[1], *failing[1:], files[2], np.zeros((3, 3), np.uint8), files[3]]
    with Segmenter(model, provider="cpu", batch_size=batch_size) as segmenter:
        results = list(segmenter.predict(inputs))
        alone = {result.image: result.rle for result in segmenter.predict(files)}
    assert len(results) == len(inputs)
    for source, result in zip(inputs, results, strict=True):
        if isinstance(source, ImageFile) and source in files:
            assert result.error is None
            assert result.rle == alone[result.image]
        else:
            assert result.error
            assert result.rle == dict.fromkeys(LABELS.classes, "")
    reasons = {result.image: result.error for result in results if result.error}
    assert "damaged" in str(reasons["cut.jpg"])
    assert "empty" in str(reasons["empty.jpg"])
    assert "No such file" in str(reasons["missing.jpg"])
    assert "image array" in str(reasons["image-7"])


def test_nothing_but_failures(model: Path) -> None:
    with Segmenter(model, provider="cpu", batch_size=2) as segmenter:
        results = list(segmenter.predict([b""] * 11))
    assert [result.image for result in results] == [f"image-{number}" for number in range(11)]
    assert all(result.error for result in results)


def test_oversized_images_are_failures(model: Path) -> None:
    jpeg_of_30_kilopixels = cv2.imencode(".jpg", draw_scene(0, (140, 210)).image)[1].tobytes()
    with Segmenter(model, provider="cpu", max_pixels=20_000) as segmenter:
        (result,) = segmenter.predict([jpeg_of_30_kilopixels])
    assert "oversized" in str(result.error)


def test_times_of_the_stages_are_kept(model: Path) -> None:
    with Segmenter(model, provider="cpu") as segmenter:
        assert segmenter.stats["infer"].seconds == 0
        list(segmenter.predict([picture(1)]))
        assert min(stage.seconds for stage in segmenter.stats.stages.values()) > 0


def test_bad_options_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="batch_size must be a whole number from 0 to 65,536, found -1"):
        Segmenter(model, provider="cpu", batch_size=-1)
    with pytest.raises(DataError, match="no provider named 'gpu'"):
        Segmenter(model, provider="gpu")
    with pytest.raises(DataError, match="use keywords such as provider='cpu'"):
        Segmenter(model, "cpu")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"no option named 'batchsize'; did you mean batch_size\?"):
        Segmenter(model, RunOptions(provider="cpu"), batchsize=4)  # type: ignore[call-arg]


def test_keywords_replace_fields_of_the_options(model: Path) -> None:
    options = RunOptions(provider="cpu", batch_size=3, threads=2, max_pixels=5000)
    with Segmenter(model, options, batch_size=2) as segmenter:
        assert segmenter.options == options.changed(batch_size=2)
        assert (segmenter.batch_size, segmenter.threads, segmenter.plan.provider) == (2, 2, "cpu")
        identity = segmenter.identity()
        assert (identity.batch_size, identity.threads, identity.max_pixels) == (2, 2, 5000)
        assert identity.plan() == segmenter.plan


def test_an_artifact_without_rules_infers_but_does_not_predict(tmp_path: Path) -> None:
    with Segmenter(tiny_artifact(tmp_path / "m.onnx", SIZE, LABELS, rules=()), provider="cpu") as segmenter:
        with pytest.raises(ArtifactError, match="no rules"):
            next(segmenter.predict([picture(1)]))
        (inferred,) = segmenter.infer([picture(1)])
        assert inferred.probability is not None and inferred.probability.shape == segmenter.artifact.output_shape


def test_results_are_the_rules_applied_to_the_inferred_probabilities(model: Path) -> None:
    inputs: list[Input] = [picture(200), b"no image", picture(100)]
    with Segmenter(model, provider="cpu", batch_size=2) as segmenter:
        results = list(segmenter.predict(inputs))
        for inferred, result in zip(segmenter.infer(inputs), results, strict=True):
            assert (inferred.image, inferred.error) == (result.image, result.error)
            assert (inferred.probability is None) == (result.error is not None)
            if inferred.probability is not None:
                texts = apply_rules(inferred.probability, segmenter.artifact.rules, inferred.presence)
                assert texts == list(result.rle.values())


def test_closing_twice_is_fine(model: Path) -> None:
    with Segmenter(model, provider="cpu") as segmenter:
        segmenter.close()


def test_the_repr_of_a_result_is_short() -> None:
    assert repr(Result("a.jpg", {"Fish": ""}, None, LABELS)) == "Result('a.jpg', no masks)"
    assert repr(Result("a.jpg", {"Fish": "1 900 2000 334"}, None, LABELS)) == "Result('a.jpg', Fish 1,234 pixels)"
    assert repr(Result("a.jpg", {"Fish": ""}, "is empty", LABELS)) == "Result('a.jpg', error='is empty')"
