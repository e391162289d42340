"""Union-find of runs: joins them into 8-connected components, and drops those of small components.

The runs are those of `cloudrt.kernels.runs`: run i covers the pixels `edges[2 * i]` to `edges[2 * i + 1] - 1`, and the
runs of column x have the numbers `first[x]` to `first[x + 1] - 1`. No pixel is read.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloudrt.kernels.bits import index
from cloudrt.kernels.jit import kernel

Ints = NDArray[np.int32]


@kernel
def _root(parent: Ints, run: int) -> int:
    """Return the root of `run` with path halving (Tarjan & van Leeuwen, J. ACM 31(2), 1984)."""
    while parent[index(run)] != run:
        parent[index(run)] = parent[index(parent[index(run)])]
        run = parent[index(run)]
    return run


@kernel
def join_runs(edges: Ints, first: Ints, width: int, height: int, parent: Ints, area: Ints) -> None:
    """Join runs into 8-connected components: `parent[i]` becomes the root of run i, `area[root]` the pixel count.

    Runs of neighbouring columns touch, diagonals included, if neither ends before the other begins. The root is the
    first run of a component, so one pass in order resolves all parents.
    """
    count = first[width]
    for run in range(count):
        parent[run] = run
        area[run] = 0
    for x in range(1, width):
        left, left_end = first[x - 1], first[x]
        right, right_end = left_end, first[x + 1]
        while left < left_end and right < right_end:
            left_stop = edges[index(2 * left + 1)] + height  # shifted to the pixel numbers of the right column
            right_stop = edges[index(2 * right + 1)]
            if edges[index(2 * left)] + height <= right_stop and edges[index(2 * right)] <= left_stop:
                a = _root(parent, left)
                if parent[index(right)] == right:  # the first contact of this run; most have only one
                    parent[index(right)] = a
                else:
                    b = _root(parent, right)
                    parent[index(max(a, b))] = min(a, b)
            if left_stop < right_stop:
                left += 1
            else:
                right += 1
    for run in range(count):
        root = parent[index(parent[index(run)])]
        parent[index(run)] = root
        area[index(root)] += edges[index(2 * run + 1)] - edges[index(2 * run)]


@kernel
def keep_runs(edges: Ints, count: int, parent: Ints, area: Ints, min_area: int) -> int:
    """Move the runs of components larger than `min_area` to the front of `edges`; return their number."""
    kept = 0
    for run in range(count):
        edges[index(2 * kept)] = edges[index(2 * run)]
        edges[index(2 * kept + 1)] = edges[index(2 * run + 1)]
        kept += int(area[index(parent[index(run)])] > min_area)
    return kept
