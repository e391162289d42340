"""The picture files of one result: its masks and its overlay, written by the threads of `cloudrt.inference.run`."""

from __future__ import annotations

import errno
from dataclasses import replace

from cloudrt.geo.tiles import MORE_PIXELS
from cloudrt.images.image import ImageFile
from cloudrt.inference.pictures import write_masks, write_overlay
from cloudrt.inference.pipeline import Segmenter
from cloudrt.inference.results import Result
from cloudrt.inference.task import InferTask


def paint(segmenter: Segmenter, task: InferTask, pair: tuple[ImageFile, Result]) -> tuple[ImageFile, Result]:
    """Write the masks and the overlay of one image, if the task asks for them.

    An image whose name the file system does not accept fails; other errors, such as a full disk, stop the run.
    """
    file, result = pair
    try:
        _write_pictures(segmenter, task, file, result)
    except OSError as error:
        if error.errno not in _NAMES:
            raise
        reason = result.error or f"its masks or overlay cannot be written: {error.strerror}"
        return file, replace(result, rle=dict.fromkeys(result.rle, ""), error=reason)
    return pair


_NAMES = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.ENOTDIR, errno.EISDIR)
"""Errors of file systems that refuse a name."""


def _write_pictures(segmenter: Segmenter, task: InferTask, file: ImageFile, result: Result) -> None:
    texts = list(result.rle.values())
    if "\0" in result.image and (task.masks or task.overlays):
        raise OSError(errno.EINVAL, "its name contains a NUL character")
    if task.masks:
        write_masks(task.masks, result.image, texts, result.labels, result.place)
    if task.overlays and result.error is None:
        limit = segmenter.options.max_pixels * (MORE_PIXELS if task.tiling else 1)
        write_overlay(task.overlays, result.image, file.path, texts, result.labels, limit)
