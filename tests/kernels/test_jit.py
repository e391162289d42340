"""Compiled kernels release the GIL; their cache: one folder per version, with checksums, or none if not writable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import cloudrt.kernels

SCRIPT = """
import sys
import numpy as np
import cloudrt
from cloudrt.kernels import runs
print(cloudrt.postprocess(np.eye(70, dtype=np.uint8)[:, :3], 0, 2))
print(sum(runs.rows_to_text.stats.cache_hits.values()), file=sys.stderr)
"""
ANSWER = "1 1 72 1 143 1"

FULL_DISK = """
from numba.core import caching
def refuse(self, *_):
    raise OSError(28, "No space left on device")
caching.IndexDataCacheFile.save = refuse
"""

FROM = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(getattr(finder, "__module__", ""))]
sys.path.insert(0, {path!r})
import cloudrt
assert cloudrt.__file__.startswith({path!r}), cloudrt.__file__
"""


def run(script: str, cache: Path) -> tuple[str, str]:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip(), done.stderr.strip()


def test_the_second_process_loads_what_the_first_compiled(tmp_path: Path) -> None:
    assert run(SCRIPT, tmp_path) == (ANSWER, "0")
    (folder,) = tmp_path.iterdir()
    assert folder.name == "cloudrt-kernels"
    files = sorted(folder.rglob("*"))
    assert run(SCRIPT, tmp_path) == (ANSWER, "1")
    assert sorted(folder.rglob("*")) == files
    assert list(tmp_path.iterdir()) == [folder]


def test_damaged_machine_code_is_compiled_again(tmp_path: Path) -> None:
    run(SCRIPT, tmp_path)
    for path in tmp_path.rglob("*.nbc"):  # numba would run the flipped byte
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    assert run(SCRIPT, tmp_path) == (ANSWER, "0")
    for path in tmp_path.rglob("*.nbi"):
        path.write_bytes(b"")
    assert run(SCRIPT, tmp_path) == (ANSWER, "0")
    assert run(SCRIPT, tmp_path) == (ANSWER, "1")


def test_nothing_is_cached_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert run(SCRIPT, tmp_path / "file" / "cache") == (ANSWER, "0")
    run(SCRIPT, tmp_path / "cache")
    for folder in (tmp_path / "cache").glob("cloudrt-kernels/*/*"):
        shutil.rmtree(folder)
        folder.touch()
    assert run(SCRIPT, tmp_path / "cache") == (ANSWER, "0")
    package = Path(cloudrt.__file__).parent
    assert not list(package.rglob("*.nbc"))  # numba's own fallback


def test_a_full_disk_is_tolerated(tmp_path: Path) -> None:
    assert run(FULL_DISK + SCRIPT, tmp_path) == (ANSWER, "0")
    assert not list(tmp_path.rglob("*.nbc"))


def test_a_changed_kernel_is_compiled_again(tmp_path: Path) -> None:
    """A kernel that is called from another file: numba's own cache checks only the caller's file."""
    source = tmp_path / "source" / "cloudrt"
    shutil.copytree(Path(cloudrt.__file__).parent, source, ignore=shutil.ignore_patterns("__pycache__", "shipped"))
    script = FROM.format(path=str(source.parent)) + SCRIPT
    assert run(script, tmp_path / "cache")[0] == ANSWER
    digits = source / "kernels" / "digits.py"
    text = digits.read_text()
    assert "start + 1)" in text
    digits.write_text(text.replace("start + 1)", "start + 2)"))
    assert run(script, tmp_path / "cache")[0] == "2 1 73 1 144 1"


def test_every_kernel_releases_the_interpreter_lock() -> None:
    modules = [import_module(f"cloudrt.kernels.{one.name}") for one in iter_modules(cloudrt.kernels.__path__)]
    kernels = [value for module in modules for value in vars(module).values() if hasattr(value, "py_func")]
    assert len(kernels) > 15
    assert all(kernel.targetoptions["nogil"] for kernel in kernels)
