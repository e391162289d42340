"""What a new process waits for: `import cloudrt`, and the first post-processing with the kernels compiled before."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np

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


def measure_startup(runs: int = 5) -> dict[str, Any]:
    """Return the median seconds, over new processes, of importing numpy, then cloudrt, then of the first call.

    A first process, which is not counted, compiles the kernels where no earlier one has.
    """
    done = []
    for _ in range(runs + 1):
        output = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True).stdout
        done.append(json.loads(output))
    numpy, package, call = np.median(done[1:], axis=0).tolist()
    return {"runs": runs, "numpy_s": numpy, "import_s": package, "first_call_s": call}
