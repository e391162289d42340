"""Post-processing with other libraries: one function per peer, from a map to the RLE text, 8-connected components.

Each takes the map in either memory layout: `by_columns` is True for (W, H), in RLE order, and False for (H, W). No peer
has to transpose the map, because the components of the transposed map are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from cloudrt.masks.rule import Rule

from .notebook import Presence, Probability, is_empty, mask_to_rle, post_process

Peer = Callable[[NDArray[Any], bool, float, int], str]
"""`peer(lines, by_columns, threshold, min_area)` returns the RLE text."""


def notebook(lines: NDArray[Any], by_columns: bool, threshold: float, min_area: int) -> str:
    """The notebook's loop over the components, each compared with the whole label image; RLE by NumPy differences."""
    kept = post_process(lines, threshold, min_area)
    return mask_to_rle(kept.T if by_columns else kept)


def opencv(lines: NDArray[Any], by_columns: bool, threshold: float, min_area: int) -> str:
    """The fastest use of OpenCV and NumPy: connectedComponentsWithStats, lookup table, vectorised RLE."""
    return _opencv(lines, by_columns, threshold, min_area, cv2.CV_32S)


def opencv_16(lines: NDArray[Any], by_columns: bool, threshold: float, min_area: int) -> str:
    """The same with 16-bit labels, half the memory; wrong for 65,536 components or more."""
    return _opencv(lines, by_columns, threshold, min_area, cv2.CV_16U)


def _opencv(lines: NDArray[Any], by_columns: bool, threshold: float, min_area: int, kind: int) -> str:
    mask = (lines > threshold).view(np.uint8)
    _, components, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8, ltype=kind)
    keep = stats[:, cv2.CC_STAT_AREA] > min_area
    keep[0] = False
    return _encode(keep.take(np.asarray(components)), by_columns)


def opencv_rows(probability: Probability, rules: Sequence[Rule], presence: Presence) -> list[str]:
    """Return the RLE text of each class of one image, from the artifact's uint8 levels, by `opencv`."""
    texts = []
    for index, rule in enumerate(rules):
        levels = probability[index]
        empty = is_empty(rule, levels, None if presence is None else int(presence[index]))
        # `levels` is a transposed view of the artifact's map: .T gives the memory layout by columns.
        texts.append("" if empty else opencv(levels.T, True, rule.threshold, rule.min_area))
    return texts


def scipy(lines: NDArray[Any], by_columns: bool, threshold: float, min_area: int) -> str:
    """`scipy.ndimage.label`, areas by bincount, lookup table, vectorised RLE."""
    from scipy import ndimage

    components, _ = ndimage.label(lines > threshold, structure=np.ones((3, 3)))
    keep = np.bincount(components.ravel()) > min_area
    keep[0] = False
    return _encode(keep.take(components), by_columns)


def cc3d(lines: NDArray[Any], by_columns: bool, threshold: float, min_area: int) -> str:
    """`cc3d.dust`, which removes small components, then vectorised RLE."""
    import cc3d as library

    mask = (lines > threshold).view(np.uint8)
    return _encode(library.dust(mask, threshold=min_area + 1, connectivity=8) > 0, by_columns)


def _encode(kept: NDArray[np.bool_], by_columns: bool) -> str:
    pixels = np.zeros(kept.size + 2, np.uint8)
    pixels[1:-1] = (kept if by_columns else kept.T).ravel()
    runs = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    runs[1::2] -= runs[::2]
    return " ".join(map(str, runs.tolist()))


def rle_decode(text: str, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Decode RLE as the competition's notebooks do."""
    tokens = text.split()
    starts, lengths = (np.asarray(part, dtype=int) for part in (tokens[0::2], tokens[1::2]))
    starts = starts - 1
    flat = np.zeros(shape[0] * shape[1], np.uint8)
    for low, high in zip(starts, starts + lengths, strict=True):
        flat[low:high] = 1
    return flat.reshape(shape, order="F")


def pycocotools_encode() -> Callable[[NDArray[np.uint8]], object]:
    """Return pycocotools' encoder, written in C, for a Fortran-ordered (H, W) mask."""
    from pycocotools import mask

    encode: Callable[[NDArray[np.uint8]], object] = mask.encode
    return encode


PEERS: dict[str, tuple[Peer, str]] = {
    "notebook": (notebook, "cv2"),
    "OpenCV": (opencv, "cv2"),
    "OpenCV, 16 bits": (opencv_16, "cv2"),
    "scipy": (scipy, "scipy"),
    "cc3d": (cc3d, "cc3d"),
}
"""Name -> peer, and the module that it needs."""


def installed(module: str) -> bool:
    """Return whether a module can be imported."""
    return find_spec(module) is not None


def missing() -> dict[str, str]:
    """Return the peers of post-processing that cannot be measured here: name -> reason."""
    needed = {name: module for name, (_, module) in PEERS.items()} | {"pycocotools encode": "pycocotools"}
    return {name: f"{module} is not installed" for name, module in needed.items() if not installed(module)}
