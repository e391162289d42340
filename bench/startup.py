"""Start-up times of a new process: `import cloudrt`, the first post-processing, and `cloudrt-infer` on one image.

The command runs with empty caches, where it compiles the kernels and measures the providers, and again with filled
caches. The peak memory is that of the last run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from cloudrt.errors import CloudrtError

_SCRIPT = """
import json, time
began = time.perf_counter()
import numpy
after_numpy = time.perf_counter()
import cloudrt
imported = time.perf_counter()
cloudrt.postprocess(numpy.zeros((525, 350), numpy.uint8).T, 127, 100)
first = time.perf_counter()
print(json.dumps([after_numpy - began, imported - after_numpy, first - imported]))
"""
_COMMAND = """
import json, sys, time
began = time.perf_counter()
from cloudrt.cli.infer import infer
from cloudrt.system.statistics import peak_memory
infer(sys.argv[1:], standalone_mode=False)
print(json.dumps([time.perf_counter() - began, peak_memory()]))
"""


def measure_startup(model: Path, image: Path, folder: Path, runs: int = 2) -> dict[str, Any]:
    """Return the medians over new processes in seconds, and the times of the command with empty and filled caches.

    A first process, which is not timed, compiles the kernels if needed.

    Parameters
    ----------
    model
        The artifact.
    image
        The image to segment.
    folder
        For caches and output.
    runs
        Number of processes that time the imports; half as many time the command with filled caches.

    Raises
    ------
    CloudrtError
        The command failed.
    subprocess.CalledProcessError
        The imports failed.
    """
    done = []
    for _ in range(runs + 1):
        output = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True).stdout
        done.append(json.loads(output))
    numpy, package, call = np.median(done[1:], axis=0).tolist()
    caches = {"XDG_CACHE_HOME": str(folder / "cache"), "NUMBA_CACHE_DIR": str(folder / "kernels")}
    words = [str(image), "--model", str(model), "--output", str(folder / "one.csv"), "--overwrite"]
    taken = [_run(words, os.environ | caches) for _ in range(1 + max(1, runs // 2))]
    return {
        "runs": runs,
        "numpy_s": numpy,
        "import_s": package,
        "first_call_s": call,
        "command_cold_s": taken[0][0],
        "command_warm_s": float(np.median([seconds for seconds, _ in taken[1:]])),
        "command_peak_mb": taken[-1][1],
    }


def _run(words: list[str], environment: dict[str, str]) -> tuple[float, float | None]:
    done = subprocess.run(
        [sys.executable, "-c", _COMMAND, *words], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise CloudrtError(f"cloudrt-infer failed in a new process: {done.stderr.strip().splitlines()[-1:]}")
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak
