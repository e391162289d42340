"""Which layers must stay in fp32? A bisection over the network's layers, whatever the lower precision is.

First the layers are put in order of the damage that lowering them does: groups are split in halves, the most damaging
first, until the few that matter stand alone. Then layers are lowered from the harmless end, halves at a time, as long
as the gate passes. What is left cannot be lowered: none of it could be taken out alone and the gate still pass, given
that lowering more never repairs what lowering less broke.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import count

SPLITS = 12
"""Groups that are split at most to order the layers; each costs two looks at a few images."""
TRIALS = 80
"""Runs of the whole gate at most; layers not decided by then stay in fp32."""


def order_by_damage(layers: Sequence[str], damage: Callable[[Sequence[str]], float], splits: int = SPLITS) -> list[str]:
    """Return the layers, those that do the least damage when lowered first; those of one group share its damage.

    Parameters
    ----------
    layers
        In the order in which they run.
    damage
        Layers that are lowered, all others not -> how wrong the result is.
    splits
        Groups that are split at most.
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
            heapq.heappush(groups, (-damage(half), next(number), half))
    ordered = sorted([*done, *groups], key=lambda group: (-group[0] / len(group[2]), group[1]))
    return [layer for _, _, group in ordered for layer in group]


def smallest_kept(ordered: Sequence[str], passes: Callable[[Sequence[str]], bool], trials: int = TRIALS) -> list[str]:
    """Return the layers to keep in fp32 so that the gate passes.

    Parameters
    ----------
    ordered
        Layers, the most harmless first. Known: the gate passes with all of them kept, and fails with none.
    passes
        Layers that are kept -> whether the gate passes.
    trials
        Calls of `passes` at most.
    """
    lowered: set[str] = set()
    left = trials

    def lower(candidates: Sequence[str], fails: bool) -> bool:
        """Lower as many candidates as can be; return whether all could. `fails`: known that all cannot."""
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
        lower(candidates[middle:], first)  # the first half lowered, the second cannot be: the whole failed
        return False

    lower(ordered, True)
    return [layer for layer in ordered if layer not in lowered]
