"""Find the layers that must stay in fp32, by bisection over the layers of the network.

To lower a layer is to compute it in fp16 or int8. First the layers are ordered by the error that this causes: groups
are split in halves, the one with the largest error first, until the few important layers are isolated. Then layers are
lowered in order of increasing error, in halves, as long as the gate passes. The result is minimal (no remaining layer
could be lowered as well) if lowering more layers never makes a failing model pass.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import count

SPLITS = 12
"""Maximum number of splits to order the layers; each costs two runs over one batch of images."""
TRIALS = 80
"""Maximum number of runs of the gate; layers not decided by then stay in fp32."""


def order_by_sensitivity(
    layers: Sequence[str], sensitivity: Callable[[Sequence[str]], float], splits: int = SPLITS
) -> list[str]:
    """Return the layers in order of increasing sensitivity; layers of one group share it equally.

    Parameters
    ----------
    layers
        In execution order.
    sensitivity
        Lowered layers, all others in fp32 -> error of the result.
    splits
        Maximum number of splits.
    """
    number = count()
    groups: list[tuple[float, int, Sequence[str]]] = [(-float("inf"), next(number), layers)]
    done: list[tuple[float, int, Sequence[str]]] = []
    for _ in range(splits):
        while groups and len(groups[0][2]) == 1:
            done.append(heapq.heappop(groups))
        if not groups:
            break
        whole = heapq.heappop(groups)[2]
        middle = len(whole) // 2
        for half in (whole[:middle], whole[middle:]):
            heapq.heappush(groups, (-sensitivity(half), next(number), half))
    ordered = sorted([*done, *groups], key=lambda group: (-group[0] / len(group[2]), group[1]))
    return [layer for _, _, group in ordered for layer in group]


def smallest_kept(ordered: Sequence[str], passes: Callable[[Sequence[str]], bool], trials: int = TRIALS) -> list[str]:
    """Return the layers to keep in fp32 so that the gate passes.

    Parameters
    ----------
    ordered
        Layers in order of increasing sensitivity. The gate passes with all of them kept, and fails with none.
    passes
        Kept layers -> whether the gate passes.
    trials
        Maximum number of calls of `passes`.
    """
    lowered: set[str] = set()
    left = trials

    def lower(candidates: Sequence[str], fails: bool) -> bool:
        """Lower as many candidates as possible; return whether all were. `fails`: all together are known to fail."""
        nonlocal lowered, left
        if not fails:
            if left == 0:
                return False
            left -= 1
            more = lowered.union(candidates)
            if passes([layer for layer in ordered if layer not in more]):
                lowered = more
                return True
        if len(candidates) == 1:
            return False
        middle = len(candidates) // 2
        first = lower(candidates[:middle], False)
        lower(candidates[middle:], first)  # if the first half was lowered, the second must fail
        return False

    lower(ordered, True)
    return [layer for layer in ordered if layer not in lowered]
