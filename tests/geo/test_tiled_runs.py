"""Runs on panoramas: masks compared with a plain loop and with single images, batches, failures, and --resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from support.placed import reasons
from support.tiled import INPUT, RULES, VIEW, tiled_model, write_picture
from support.tiny import SMALL_GRIDS, tiny_artifact, tiny_model

import cloudrt
from cloudrt.data.scenes import draw_scene
from cloudrt.engines.base import Engine
from cloudrt.engines.pool import EnginePool
from cloudrt.errors import DataError
from cloudrt.geo.mask_grid import MaskGrid
from cloudrt.geo.tiles import open_panorama
from cloudrt.geo.tiling import Tiling, offsets
from cloudrt.images.image import ImageFile, StoredImage, load_image
from cloudrt.inference.panoramas import predict_panoramas
from cloudrt.inference.pipeline import Segmenter
from cloudrt.masks.rle import rle_decode
from cloudrt.masks.rule import Rule
from cloudrt.masks.table import read_table
from cloudrt.model.artifact import parse_artifact, read_artifact, write_metadata
from cloudrt.options import RunOptions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiled_model(tmp_path_factory.mktemp("model"))


def run(inputs: Path, output: Path, model: Path, **options: object) -> dict[tuple[str, str], str]:
    cloudrt.infer(inputs, output, model, provider="cpu", threads=2, **options)  # type: ignore[arg-type]
    return read_table(output, SMALL_GRIDS)


def plain_levels(model: Path, image: NDArray[np.uint8], overlap: float) -> NDArray[np.float64]:
    """Blend in a plain loop: each tile through ONNX Runtime at batch 1, weights and sums in float64."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    height, width = image.shape[:2]
    padded = np.zeros((height + VIEW[0], width + VIEW[1], 3), np.uint8)
    padded[:height, :width] = image
    total = np.zeros((3, (height + VIEW[0]) // 2, (width + VIEW[1]) // 2))
    weight = np.zeros(total.shape[1:])
    sides = [np.minimum(np.arange(n) + 0.5, n - np.arange(n) - 0.5) for n in (60, 90)]
    ramps = [np.minimum(side / max(1, overlap * len(side)), 1) for side in sides]
    for y in offsets(height, VIEW[0], 8, overlap):
        for x in offsets(width, VIEW[1], 8, overlap):
            tile = padded[y : y + VIEW[0], x : x + VIEW[1]]
            small = load_image(tile, INPUT)  # as a single image
            levels, presence = session.run(["probability", "presence"], {"image": small[None]})
            for k, rule in enumerate(RULES):
                found = levels[0, k].T.astype(float)
                if presence[0, k] < rule.presence or (found > rule.gate_threshold).sum() < rule.gate_pixels:
                    found[:] = 0
                total[k, y // 2 : y // 2 + 60, x // 2 : x // 2 + 90] += found * np.outer(*ramps)
            weight[y // 2 : y // 2 + 60, x // 2 : x // 2 + 90] += np.outer(*ramps)
    grid = -(-height // 2), -(-width // 2)
    return total[:, : grid[0], : grid[1]] / weight[: grid[0], : grid[1]]


def test_the_masks_are_those_of_a_plain_loop(model: Path, tmp_path: Path) -> None:
    image = draw_scene(5, (331, 530)).image
    found = run(write_picture(tmp_path / "a.png", image), tmp_path / "a.csv", model, tile=True, overlap=0.3)
    levels = plain_levels(model, image, 0.3)
    areas = []
    for k, (name, rule) in enumerate(zip(SMALL_GRIDS.classes, RULES, strict=True)):
        on = np.rint(levels[k]) > rule.threshold
        numbers, count = ndimage.label(on, np.ones((3, 3)))
        sizes = ndimage.sum_labels(on, numbers, np.arange(count + 1))
        kept = (sizes > rule.min_area)[numbers] & on
        mask = rle_decode(found["a.png", name], (166, 265))
        unsure = np.abs(levels[k] - rule.threshold - 0.5) < 1e-3
        assert (mask[~unsure] == kept[~unsure]).all()
        areas.append(int(mask.sum()))
    assert all(0 < area < 166 * 265 for area in areas)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_one_field_of_view_gives_the_bytes_of_the_image(model: Path, tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for seed, size in enumerate([VIEW, VIEW, (100, 150), (90, 180)]):  # smaller ones too: they are resized
        write_picture(folder / f"{seed}{suffix}", draw_scene(seed, size).image)
    run(folder, tmp_path / "whole.csv", model)
    run(folder, tmp_path / "tiles.csv", model, tile=True)
    assert (tmp_path / "whole.csv").read_bytes() == (tmp_path / "tiles.csv").read_bytes()
    assert len((tmp_path / "whole.csv").read_bytes()) > 1000


def test_a_component_across_the_date_line_is_one(tmp_path: Path) -> None:
    artifact = tmp_path / "m.onnx"
    graph = tiny_model(INPUT, SMALL_GRIDS, rules=(Rule(127, 1000),) * 3, field_of_view=VIEW)
    write_metadata(graph, replace(parse_artifact(graph, artifact), pixels_per_degree=2.0))
    artifact.write_bytes(graph.SerializeToString())
    image = np.full((120, 720, 3), 20, np.uint8)
    image[30:90, :40] = image[30:90, -40:] = 250  # 600 pixels of the grid on either side
    path = write_picture(tmp_path / "x20200101_-180-180_-30-30.png", image)
    found = run(path, tmp_path / "a.csv", artifact, tile=True)
    mask = rle_decode(found[path.name, "Fish"], (60, 360))
    assert mask[16:44, :18].all() and mask[16:44, -18:].all() and not mask[:, 30:-30].any()
    cut = write_picture(tmp_path / "cut.png", image)
    assert not run(cut, tmp_path / "b.csv", artifact, tile=True)[cut.name, "Fish"]


def test_few_panoramas_are_opened_ahead(model: Path, tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", np.full((120, 180, 3), 60, np.uint8))
    taken = 0
    at_first: list[int] = []

    def files() -> Iterator[ImageFile]:
        nonlocal taken
        for number in range(12):
            taken += 1
            yield ImageFile(f"{number}.png", path)

    class Counts:
        def check(self, _key: str, _place: MaskGrid) -> None:
            at_first.append(taken)

    with Segmenter(model, RunOptions(provider="cpu", threads=8)) as segmenter:
        assert len(list(predict_panoramas(segmenter, files(), Tiling(), [Counts()]))) == 12
    assert at_first[0] == 5 and len(at_first) == 12


def test_a_stored_image_that_is_an_array_fails_alone(model: Path, tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png", np.full((120, 180, 3), 60, np.uint8))
    files = [StoredImage("a.png", lambda: np.zeros((120, 180, 3), np.uint8)), StoredImage("b.png", path.read_bytes)]
    with Segmenter(model, RunOptions(provider="cpu", threads=1)) as segmenter:
        array, sound = predict_panoramas(segmenter, files, Tiling())
    assert str(array.error).startswith("is an array") and sound.error is None


def test_tiles_of_all_panoramas_share_batches(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        write_picture(tmp_path / f"{seed}.png", draw_scene(seed, (200, 300)).image)
    tiles = len(open_panorama(tmp_path / "0.png", read_artifact(model), Tiling(), 10**6).tiles)
    sizes: list[int] = []
    before = EnginePool._run

    def run_batch(pool: EnginePool, engine: Engine, images: Any) -> Any:
        sizes.append(len(images))
        return before(pool, engine, images)

    with Segmenter(model, RunOptions(provider="cpu", threads=1, batch_size=5)) as segmenter:
        monkeypatch.setattr(EnginePool, "_run", run_batch)
        files = [ImageFile(path.name, path) for path in sorted(tmp_path.glob("*.png"))]
        assert len(list(predict_panoramas(segmenter, files, Tiling()))) == 3
    assert tiles % 5 and sizes == [5] * (3 * tiles // 5) + [3 * tiles % 5] * (3 * tiles % 5 > 0)


def test_what_cannot_be_read_fails_alone(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
        write_picture(folder / name, draw_scene(7, (300, 400)).image)
    data = (folder / "b.jpg").read_bytes()
    (folder / "b.jpg").write_bytes(data[: len(data) // 2])
    (folder / "c.jgw").write_text("not numbers")
    summary = cloudrt.infer(folder, tmp_path / "s.csv", model, provider="cpu", tile=True)
    failed = reasons(summary)
    assert len(failed) == summary.failed == 2
    assert "damaged JPEG" in failed["b.jpg"] and "c.jgw, that is not six numbers" in failed["c.jpg"]
    found = read_table(tmp_path / "s.csv", SMALL_GRIDS)
    assert found["a.jpg", "Fish"] and found["a.jpg", "Fish"] == found["d.jpg", "Fish"]
    assert not found["b.jpg", "Fish"] and not found["c.jpg", "Fish"]


def test_one_day_and_place_have_one_size(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_picture(folder / "a20200101_0-4_0-3.png", draw_scene(3, (300, 400)).image)
    write_picture(folder / "b20200101_0-4_0-3.png", draw_scene(3, (150, 200)).image)  # the same grid
    write_picture(folder / "c20200101_0-4_0-3.png", draw_scene(3, (303, 402)).image)
    write_picture(folder / "d20200102_0-4_0-3.png", draw_scene(3, (303, 402)).image)
    summary = cloudrt.infer(folder, tmp_path / "s.csv", model, provider="cpu", tile=True)
    failed = reasons(summary)
    assert list(failed) == ["c20200101_0-4_0-3.png"]
    assert "same place on the same day as a20200101" in failed["c20200101_0-4_0-3.png"]


def test_an_interrupted_run_ends_with_the_same_bytes(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for seed in range(6):
        write_picture(folder / f"{seed}_0-4_0-3.png", draw_scene(seed, (300, 400)).image)
    options = {"tile": True, "batch_size": 3, "masks": tmp_path / "masks"}
    run(folder, tmp_path / "whole.csv", model, **options)

    @contextmanager
    def stopping(_text: str, _total: int) -> Iterator[Callable[..., object]]:
        done = 0

        def advance(*_: object, **__: object) -> None:
            nonlocal done
            done += 1
            if done == 4:
                raise KeyboardInterrupt

        yield advance

    options |= {"overwrite": True}
    with pytest.raises(KeyboardInterrupt):
        cloudrt.infer(folder, tmp_path / "cut.csv", model, provider="cpu", threads=2, progress=stopping, **options)  # type: ignore[arg-type]
    assert (tmp_path / "cut.csv.journal").exists()
    options |= {"overwrite": False, "resume": True}
    with pytest.raises(DataError, match="tiling was"):
        run(folder, tmp_path / "cut.csv", model, **options, overlap=0.4)
    summary = cloudrt.infer(folder, tmp_path / "cut.csv", model, provider="cpu", threads=2, **options)  # type: ignore[arg-type]
    assert summary.images == 6 and 0 < summary.resumed < 6
    assert (tmp_path / "cut.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_invalid_options_are_refused(model: Path, tmp_path: Path) -> None:
    image = write_picture(tmp_path / "a.png", draw_scene(0, (300, 400)).image)
    with pytest.raises(DataError, match="overlap must be from"):
        run(image, tmp_path / "a.csv", model, tile=True, overlap=0.95)
    with pytest.raises(DataError, match="save_probabilities"):
        run(image, tmp_path / "a.csv", model, tile=True, save_probabilities=tmp_path / "p.npz")
    with pytest.raises(DataError, match="outside the Earth"):
        run(image, tmp_path / "a.csv", model, tile=True, bounds=(0, 0, 10, 95))
    with pytest.raises(DataError, match="needs `tile=True`"):
        run(image, tmp_path / "a.csv", model, bounds=(0, 0, 4, 3))
    odd = tiny_artifact(tmp_path / "odd.onnx", INPUT, SMALL_GRIDS, field_of_view=(130, 180))
    with pytest.raises(DataError, match="not a multiple of its submission grid"):
        run(image, tmp_path / "a.csv", odd, tile=True)
