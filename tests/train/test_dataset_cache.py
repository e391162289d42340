"""Dataset caches: damage, what killed runs left, full disks."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
from cloudrt.train.cache import open_cache

from cloudrt.data.folder import open_data
from cloudrt.system.cache import SEAL
from cloudrt.system.files import partial_path


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


def test_what_a_killed_run_left_of_a_cache_is_removed(scenes: Path, tmp_path: Path) -> None:
    left = tmp_path / f"{partial_path(tmp_path / 'data').name.rpartition('-')[0]}-1.part"
    left.mkdir()
    (left / "images.npy").write_bytes(b"half")
    open_cache(open_data(scenes), (64, 96), tmp_path)
    assert not left.exists()


def test_a_full_disk_names_the_cache_and_ends_nothing(scenes: Path, tmp_path: Path) -> None:
    """Also where only a write to the mapped file would fail: that ends the process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            open_cache(open_data(scenes), (64, 96), tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
