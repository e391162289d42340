"""Run-length encoding (RLE) of masks, in the competition's format.

Pixels are numbered from 1 in column-major order: down the first column, then down the next one to its right. The text
is `start length start length ...`; runs ascend, do not touch, and lie within the mask. An empty mask is the empty
string. For example

    0 1 0
    1 1 0    is "2 3": pixel 2 (row 2, column 1), pixels 3 and 4 (column 2)
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloudrt.arguments import check_array, check_grid
from cloudrt.errors import RleError
from cloudrt.kernels import text as kernels
from cloudrt.labels import CLOUDS, SUBMIT_GRID, Grid, Labels

_FAULTS = {
    kernels.NOT_A_NUMBER: "is not a positive whole number",
    kernels.ODD_COUNT: "is a start without a length: the count of numbers is odd",
    kernels.ZERO: "is zero: starts count from 1 and a run holds at least one pixel",
    kernels.OVERLAP: "overlaps or precedes the run before it: runs must ascend",
}


def rle_encode(mask: NDArray[Any]) -> str:
    """Return the RLE text of a mask.

    Parameters
    ----------
    mask
        (H, W) bool or integer; a pixel is on if it is not zero.

    Raises
    ------
    RleError
        Not an array, not two-dimensional, or neither bool nor integer.
    DataError
        More than `cloudrt.masks.postprocess.MAX_PIXELS` pixels.

    Examples
    --------
    >>> rle_encode(np.array([[0, 1, 0], [1, 1, 0]], np.uint8))
    '2 3'
    """
    check_array("a mask", mask, "(H, W)", RleError)
    if mask.ndim != 2:
        raise RleError(f"a mask must be (H, W), found an array of shape {mask.shape}")
    if mask.dtype.kind not in "bui":
        raise RleError(f"a mask must be bool or integer, found {mask.dtype}")
    from cloudrt.masks.postprocess import encode_mask

    return encode_mask(mask.view(np.uint8) if mask.dtype.itemsize == 1 else (mask != 0).view(np.uint8))


def rle_decode(text: str, shape: Grid = SUBMIT_GRID) -> NDArray[np.uint8]:
    """Return the mask of an RLE text.

    Parameters
    ----------
    text
        Runs as numbers separated by spaces, tabs or line breaks. Runs that touch are accepted.
    shape
        Height and width in pixels.

    Returns
    -------
    numpy.ndarray
        (H, W) uint8, 0 or 1, Fortran-ordered.

    Raises
    ------
    RleError
        `text` is not a string, has an odd count of numbers or a number that is not a positive integer, or has runs that
        overlap, do not ascend or exceed the mask; the message names the token and its position. Or `shape` is not two
        whole numbers.

    Examples
    --------
    >>> rle_decode("2 3", (2, 3)).tolist()
    [[0, 1, 0], [1, 1, 0]]
    """
    height, width = shape = check_grid("shape", shape, error=RleError)
    edges, count = _runs(text, shape)
    flat = np.zeros(width * height, np.uint8)
    kernels.paint_runs(edges, count, flat)
    return flat.reshape(width, height).T


def rle_to_submit_grid(text: str, labels: Labels = CLOUDS) -> NDArray[np.uint8]:
    """Return the mask of an RLE text on the label grid, reduced to the submission grid.

    A pixel is on if at least half of its block of label pixels is on. The pixels of the runs are counted per block,
    without painting the label grid, which has 16 times as many pixels for the clouds.

    Returns
    -------
    numpy.ndarray
        (H, W) uint8, 0 or 1, Fortran-ordered.

    Raises
    ------
    RleError
        See `rle_decode`.
    """
    (height, _), (rows, columns) = labels.label_grid, labels.submit_grid
    edges, count = _runs(text, labels.label_grid)
    counts = np.zeros((columns, rows), np.int32)
    kernels.count_blocks(edges, count, height, *labels.block, counts)
    block_height, block_width = labels.block
    return (block_height * block_width <= 2 * counts.T).view(np.uint8)


def rle_area(text: str) -> int:
    """Return the number of pixels of the mask of a valid RLE text."""
    return sum(map(int, text.split()[1::2]))


def _runs(text: str, shape: Grid) -> tuple[NDArray[np.int64], int]:
    """Return the edges of the runs, start, stop, start, stop, ..., in pixels counted from 0, and the number of runs."""
    if not isinstance(text, str):
        raise RleError(f"an RLE text must be a string, found {type(text).__name__}")
    height, width = shape
    content = np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
    edges = np.empty(content.size // 2 + 1, np.int64)
    count, fault, token = kernels.parse_runs(content, width * height, edges)
    if fault:
        number = re.findall(r"[^ \t\n\r]+", text)[token]  # str.split() would split at other white space too
        shown = number if len(number) <= 24 else f"{number[:20]}..."
        reason = _FAULTS.get(fault, f"is out of bounds: the {width}x{height} grid has {height * width} pixels")
        raise RleError(f"RLE token {token + 1} ({shown!r}) {reason}")
    return edges, count


def pack_mask(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack an (H, W) mask of 0 and 1 into bits in RLE order: (ceil(W * H / 8),) uint8."""
    return np.packbits(mask.T, axis=None)


def unpack_mask(bits: NDArray[np.uint8], grid: Grid) -> NDArray[np.uint8]:
    """Return the (H, W) uint8 mask of 0 and 1, Fortran-ordered, that `pack_mask` packed."""
    height, width = grid
    return np.unpackbits(bits, count=width * height).reshape(width, height).T
