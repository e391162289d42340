"""What `cloudrt-infer` refuses before any work: outputs that would replace something, or that cannot be written."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from cloudrt.system.terminal import Failure

if TYPE_CHECKING:
    from cloudrt.images.image import ImageFile


def check_outputs(
    output: Path,
    model: Path | None,
    sample: Path | None,
    report: bool,
    stats: Path | None,
    probabilities: Path | None,
    masks: Path | None,
    overlays: Path | None,
) -> None:
    """Refuse, before any work, outputs that would replace each other or what is read, or that cannot be written."""
    from cloudrt.inference.submission import failures_path, journal_path

    written = {"--output": output, "the list of failures": failures_path(output), "the journal": journal_path(output)}
    written |= {"the report": output.with_name("report.html")} if report else {}
    written |= {"--stats": stats} if stats else {}
    written |= {"--save-probabilities": probabilities} if probabilities else {}
    read = {name: path for name, path in (("--model", model), ("--sample", sample)) if path}
    taken: dict[str, str] = {}
    for name, path in [*read.items(), *written.items()]:
        place = os.path.realpath(path)
        if place in taken:
            raise Failure(f"{path} would be replaced: it is {taken[place]} and {name}; give another name")
        taken[place] = name
    for name, path in written.items():
        if path.exists() and not path.is_file():
            raise Failure(f"{path} ({name}) is not a regular file: give the name of a file to write")
    for folder in (masks, overlays):
        if folder and folder.exists() and not folder.is_dir():
            raise Failure(f"{folder} is no folder: pictures go to one")


def spare_inputs(files: list[ImageFile], outputs: tuple[Path | None, ...]) -> None:
    """Refuse to write over an image that is read."""
    there = {os.path.realpath(path) for path in outputs if path and path.exists()}
    for file in files if there else []:
        if os.path.realpath(file.path) in there:
            raise Failure(f"{file.path} is one of the images: give another name to write to")


def check_keys(files: list[ImageFile]) -> None:
    """Refuse keys that would lead pictures out of their folder: a list may hold such."""
    for file in files:
        if PurePosixPath(file.key).is_absolute() or ".." in PurePosixPath(file.key).parts:
            raise Failure(f"{file.key!r} leads out of the folder of --masks and --overlays: list it by a path within")
