"""Reading RLE text: digits to runs, every rule checked on the way, nothing ever read or written out of bounds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloudrt.kernels.jit import kernel

OK = 0
NOT_A_NUMBER = 1
ODD_COUNT = 2
ZERO = 3
OVERLAP = 4
OUT_OF_BOUNDS = 5


@kernel
def paint_runs(  # noqa: PLR0911 - a return for each rule
    text: NDArray[np.uint8], flat: NDArray[np.uint8]
) -> tuple[int, int]:
    """Set the runs of `text` to 1 in `flat`, a mask in RLE order; return (what is wrong, at which token, from 0).

    Pixels painted before a fault stay painted: the caller drops `flat` then.
    """
    size = flat.size
    token = -1
    value = 0
    inside = False
    start = 0
    end = 0
    for i in range(text.size + 1):
        byte = text[i] if i < text.size else 32
        if byte in (32, 9, 10, 13):
            if not inside:
                continue
            inside = False
            if value == 0:
                return ZERO, token
            if token % 2 == 0:
                if value > size:
                    return OUT_OF_BOUNDS, token
                if value - 1 < end:
                    return OVERLAP, token
                start = value - 1
            else:
                if value > size - start:
                    return OUT_OF_BOUNDS, token
                end = start + value
                flat[start:end] = 1
            continue
        if not inside:
            token += 1
            value = 0
            inside = True
        if byte < 48 or byte > 57:
            return NOT_A_NUMBER, token
        value = min(value * 10 + (byte - 48), size + 1)  # past the end is past the end: no overflow
    if token % 2 == 0:
        return ODD_COUNT, token
    return OK, token
