"""Stored probabilities: a round trip, and files that would take much more memory than their size."""

from __future__ import annotations

import json
import os
import tracemalloc
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from support.tiny import SMALL_GRIDS

from cloudrt.data.folder import DataFolder
from cloudrt.errors import DataError
from cloudrt.labels import Labels
from cloudrt.search import probabilities
from cloudrt.search.probabilities import Probabilities, labelled_maps, write_probabilities

BOMB = 64 * 2**20
TINY = Labels(("Fish", "Flower"), (4, 6), (2, 3))


def write(path: Path, grids: Labels, **members: np.ndarray) -> Path:
    """Write members without the checks of `write_probabilities`."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in {"labels": np.array(json.dumps(grids.to_dict())), **members}.items():
            content = BytesIO()
            np.lib.format.write_array(content, array, allow_pickle=False)
            archive.writestr(f"{name}.npy", content.getvalue())
    return path


def peak_of(path: Path) -> tuple[str, int]:
    """Read a file that is refused; return the message and the largest number of bytes allocated."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught, Probabilities(path) as kept:
            kept.read("a")
        return str(caught.value), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_probabilities_round_trip(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    maps = {f"sub/{n} ä.jpg": rng.integers(0, 256, (3, 90, 60), dtype=np.uint8) for n in range(3)}
    presences = {key: rng.integers(0, 256, 3, dtype=np.uint8) for key in maps}
    with write_probabilities(tmp_path / "p.npz", SMALL_GRIDS) as writer:
        for key, levels in maps.items():
            writer.add(key, np.asfortranarray(levels), presences[key] if key.startswith("sub/1") else None)
        assert not (tmp_path / "p.npz").exists()
    with Probabilities(tmp_path / "p.npz") as kept:
        assert kept.labels == SMALL_GRIDS
        assert kept.keys == list(maps)
        for key, levels in maps.items():
            found, presence = kept.read(key)
            assert np.array_equal(found, levels)
            assert (presence is not None) == key.startswith("sub/1")
            assert presence is None or np.array_equal(presence, presences[key])


def test_stored_images_without_rows_are_refused(tmp_path: Path) -> None:
    images, table = tmp_path / "train_images", tmp_path / "train.csv"
    images.mkdir()
    table.write_text("Image_Label,EncodedPixels\na.jpg_Fish,1 3\na.jpg_Flower,\n")
    with write_probabilities(tmp_path / "p.npz", TINY) as writer:
        writer.add("b.jpg", np.zeros((2, 3, 2), np.uint8), None)
    with Probabilities(tmp_path / "p.npz") as kept, pytest.raises(DataError, match=r"no rows of b\.jpg"):
        list(labelled_maps(kept, DataFolder(tmp_path, TINY, images, table)))


@pytest.mark.parametrize("member", ["labels", "maps/a", "presence/a"])
def test_a_bomb_is_refused_before_it_is_inflated(tmp_path: Path, member: str) -> None:
    classes, (height, width) = len(SMALL_GRIDS.classes), SMALL_GRIDS.submit_grid
    sound = {"maps/a": np.zeros((classes, width, height), np.uint8)}
    path = write(tmp_path / "p.npz", SMALL_GRIDS, **(sound | {member: np.zeros(BOMB, np.uint8)}))
    assert path.stat().st_size < BOMB / 500
    said, peak = peak_of(path)
    assert f"p.npz, {member}.npy: " in said and "bytes, expected at most" in said
    assert peak < BOMB / 8


def test_a_huge_grid_does_not_raise_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probabilities, "MAX_MAP_BYTES", 2**20)
    huge = Labels(("a",), (2**13, 2**13), (2**13, 2**13))
    path = write(tmp_path / "p.npz", huge, **{"maps/a": np.zeros((1, 2**13, 2**13), np.uint8)})
    said, peak = peak_of(path)
    assert "expected at most" in said and peak < BOMB / 8


def test_a_wrong_size_in_the_directory_is_damage(tmp_path: Path) -> None:
    """The ZIP directory states a small size for a large member."""
    path = write(tmp_path / "p.npz", SMALL_GRIDS, **{"maps/a": np.zeros(BOMB, np.uint8)})
    content = path.read_bytes()
    size = (BOMB + 128).to_bytes(4, "little")
    assert content.count(size) == 2  # before the data, and in the directory
    path.write_bytes(content.replace(size, (5000).to_bytes(4, "little")))
    said, peak = peak_of(path)
    assert "p.npz, maps/a.npy: Bad CRC-32" in said and peak < 2 * BOMB


def test_a_damaged_directory_never_hides_an_array(tmp_path: Path) -> None:
    """One bit, or all, of each byte after the arrays is flipped; no checksum of the format covers these bytes."""
    path = tmp_path / "p.npz"
    with write_probabilities(path, TINY) as writer:
        for number in range(2):
            writer.add(f"{number}.jpg", np.full((2, 3, 2), number, np.uint8), np.full(2, number, np.uint8))

    def read() -> dict[str, list[bytes]]:
        with Probabilities(path) as kept:
            return {key: [array.tobytes() for array in kept.read(key) if array is not None] for key in kept.keys}

    sound, content = read(), path.read_bytes()
    refused = 0
    for place in range(content.index(b"PK\x01\x02"), len(content)):
        for bits in (1, 8, 64, 255):
            path.write_bytes(content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :])
            try:
                assert read() == sound
            except DataError:
                refused += 1
    assert refused > 500


def test_a_file_of_many_arrays_is_read(tmp_path: Path) -> None:
    """A zip file with more than 65,535 members states their number in its ZIP64 record."""
    count = 0x10000
    with zipfile.ZipFile(tmp_path / "p.npz", "w") as archive, archive.open("labels.npy", "w") as file:
        np.lib.format.write_array(file, np.array(json.dumps(TINY.to_dict())), allow_pickle=False)
    with zipfile.ZipFile(tmp_path / "p.npz", "a") as archive:
        for number in range(count - 1):
            archive.writestr(f"maps/{number}.npy", b"")
    with Probabilities(tmp_path / "p.npz") as kept:
        assert len(kept.keys) == count - 1


def test_too_many_arrays_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with write_probabilities(tmp_path / "p.npz", SMALL_GRIDS) as writer:
        for key in "abc":
            writer.add(key, np.zeros((1, 1, 1), np.uint8))
    monkeypatch.setattr(probabilities, "MAX_MEMBERS", 3)
    with pytest.raises(DataError, match="contains more than 3 arrays"):
        Probabilities(tmp_path / "p.npz")


@pytest.mark.parametrize("text", ["[]", "5", "null", '"labels"'])
def test_labels_that_are_not_an_object_are_refused(tmp_path: Path, text: str) -> None:
    with zipfile.ZipFile(tmp_path / "p.npz", "w") as archive, archive.open("labels.npy", "w") as file:
        np.lib.format.write_array(file, np.array(text), allow_pickle=False)
    with pytest.raises(DataError, match="expected an object"):
        Probabilities(tmp_path / "p.npz")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(DataError, match="not a regular file"):
        Probabilities(tmp_path / "pipe.npz")
