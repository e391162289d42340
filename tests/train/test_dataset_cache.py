"""Dataset caches: their contents, changed data, damage, what killed runs left, and full disks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from cloudrt.train.cache import open_cache
from support import reference
from support.files import file_size_limit

from cloudrt.data.folder import open_data
from cloudrt.errors import DataError
from cloudrt.masks.rle import unpack_mask
from cloudrt.system.cache import SEAL
from cloudrt.system.files import partial_path


def test_cache_holds_truth_by_blocks(scenes: Path, cached: Path) -> None:
    data = open_data(scenes)
    cache = open_cache(data, (64, 96), cached)
    rows = data.read_train()
    name = cache.names[0]
    for c, label in enumerate(data.labels.classes):
        plain = reference.shrink(reference.rle_decode(rows[name][label], (1400, 2100)), (4, 4))
        assert np.array_equal(unpack_mask(cache.truth[0, c], (350, 525)), plain)


def test_cache_is_built_once_and_again_when_data_or_input_size_change(scenes: Path, tmp_path: Path) -> None:
    data, caches = shutil.copytree(scenes, tmp_path / "data"), tmp_path / "cache"
    calls: list[int] = []

    def images_decoded(input_size: tuple[int, int] = (64, 96)) -> int:
        calls.clear()
        open_cache(open_data(data), input_size, caches, advance=calls.append)
        return len(calls)

    assert [images_decoded(), images_decoded()] == [12, 0]
    assert [images_decoded((32, 64)), images_decoded((32, 64))] == [12, 0]
    image = min((data / "train_images").iterdir())
    shutil.copyfile(max((data / "train_images").iterdir()), image)
    assert [images_decoded(), images_decoded()] == [12, 0]
    lines = (data / "train.csv").read_text().splitlines()
    lines[1] = f"{lines[1].split(',')[0]},1 1"
    (data / "train.csv").write_text("\n".join(lines) + "\n")
    assert [images_decoded(), images_decoded()] == [12, 0]
    assert len(list(caches.iterdir())) == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [("1 2 3", "odd"), ("2940000 2", "out of bounds"), ("5 3 2 1", "ascend")],
)
def test_wrong_rle_names_row_and_leaves_no_cache(scenes: Path, tmp_path: Path, text: str, said: str) -> None:
    data = shutil.copytree(scenes, tmp_path / "data")
    lines = (data / "train.csv").read_text().splitlines()
    key = lines[5].split(",")[0]
    lines[5] = f"{key},{text}"
    (data / "train.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=said) as caught:
        open_cache(open_data(data), (64, 96), tmp_path / "cache")
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "unsealed", "index"])
def test_a_damaged_cache_is_built_again(scenes: Path, tmp_path: Path, damage: str) -> None:
    data = open_data(scenes)
    sound = open_cache(data, (64, 96), tmp_path)
    images, truth = np.array(sound.images), np.array(sound.truth)
    (folder,) = tmp_path.iterdir()
    file = folder / {"index": "index.json", "cut": "truth.npy"}.get(damage, "images.npy")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage in ("flip", "index"):
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1])
    else:
        (file if damage == "missing" else file.with_name(file.name + SEAL)).unlink()
    calls: list[int] = []
    again = open_cache(data, (64, 96), tmp_path, advance=calls.append)
    assert len(calls) == 12
    assert again.names == sound.names
    assert (again.images == images).all() and (again.truth == truth).all()
    open_cache(data, (64, 96), tmp_path, advance=calls.append)
    assert len(calls) == 12


def test_a_cache_that_another_run_built_meanwhile_is_kept(scenes: Path, tmp_path: Path) -> None:
    """The other run may be opening its files."""
    data = open_data(scenes)
    open_cache(data, (64, 96), tmp_path / "other")
    (made,) = (tmp_path / "other").iterdir()
    theirs = tmp_path / "cache" / made.name

    def finish_other(_count: int) -> None:
        if not theirs.exists():
            shutil.copytree(made, theirs)
            (theirs / "mark").touch()

    cache = open_cache(data, (64, 96), tmp_path / "cache", advance=finish_other)
    assert len(cache.names) == 12
    assert (theirs / "mark").exists()
    assert list((tmp_path / "cache").iterdir()) == [theirs]


def test_what_a_killed_run_left_of_a_cache_is_removed(scenes: Path, tmp_path: Path) -> None:
    left = tmp_path / f"{partial_path(tmp_path / 'data').name.rpartition('-')[0]}-1.part"
    left.mkdir()
    (left / "images.npy").write_bytes(b"half")
    open_cache(open_data(scenes), (64, 96), tmp_path)
    assert not left.exists()


def test_a_full_disk_is_an_error_that_names_the_cache(scenes: Path, tmp_path: Path) -> None:
    """The space is reserved first: a write to a memory-mapped file on a full disk would end the process with SIGBUS."""
    with file_size_limit(100_000), pytest.raises(OSError, match="File too large") as caught:
        open_cache(open_data(scenes), (64, 96), tmp_path / "cache")
    assert caught.value.filename == str(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
