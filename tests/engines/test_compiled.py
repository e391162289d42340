"""Compiled networks in the cache: the same outputs, and damaged ones are never run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.tiny import SMALL_GRIDS, tiny_model

from cloudrt.engines.base import EngineOptions
from cloudrt.engines.choice import open_engine
from cloudrt.system.cache import SEAL

pytest.importorskip("openvino")
KEEP = EngineOptions(keep_compiled=True)
MODEL = tiny_model(labels=SMALL_GRIDS)
BATCH = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), np.uint8)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "cloudrt" / "openvino"


def answer(options: EngineOptions = KEEP) -> np.ndarray:
    with open_engine(MODEL, "openvino", 2, 1, options) as engine:
        return engine.probability(BATCH)


def blobs(cache: Path) -> list[Path]:
    return [path for path in cache.glob("*/*") if path.suffix != SEAL]


def test_the_second_start_reads_what_the_first_one_compiled(cache: Path) -> None:
    plain = answer(EngineOptions())
    assert not cache.exists()
    first = answer()
    (blob,) = blobs(cache)
    written = blob.stat().st_mtime_ns
    second = answer()
    assert (plain == first).all() and (first == second).all()
    assert blobs(cache) == [blob] and blob.stat().st_mtime_ns == written


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "unsealed"])
def test_damaged_networks_are_compiled_again(cache: Path, damage: str) -> None:
    plain = answer()
    (blob,) = blobs(cache)
    content = bytearray(blob.read_bytes())
    blob.chmod(0o600)
    if damage == "flip":
        for place in range(len(content) // 3, len(content), 50):
            content[place] ^= 0xFF
        blob.write_bytes(content)
    elif damage == "unsealed":
        blob.with_name(blob.name + SEAL).unlink()
    else:
        blob.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    assert (answer() == plain).all()
    (again,) = blobs(cache)
    written = again.stat().st_mtime_ns
    assert (answer() == plain).all()
    assert again.stat().st_mtime_ns == written  # the network that was compiled again is read


def test_no_writable_cache_is_needed(cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("in the way")
    assert (answer() == answer(EngineOptions())).all()
