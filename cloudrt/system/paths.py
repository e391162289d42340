"""Check the output paths of a command before it starts.

No output may be an input, and no two outputs may be the same file. No input or output may lie below an output that is a
file, or a folder that is replaced as a whole. Existing outputs are replaced only with `overwrite`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from cloudrt.errors import DataError

Paths = Mapping[str, Path | None]
"""Option or argument, or a phrase with it, such as "--output", "`output`" or "the page of --output" -> path or None."""


def check_outputs(
    files: Paths,
    reads: Paths | None = None,
    *,
    folders: Paths | None = None,
    stores: Paths | None = None,
    images: Iterable[Path] = (),
    overwrite: bool | None = False,
) -> None:
    """Raise DataError for outputs that would replace an input or an existing file, or that cannot be written.

    Parameters
    ----------
    files
        Files that the command writes.
    reads
        Files and folders that it reads.
    folders
        Folders that it writes files into.
    stores
        Folders that it writes, or replaces, as a whole.
    images
        Image files that it reads.
    overwrite
        Whether outputs that exist may be replaced; inputs never are. None where the command has no such option.

    Raises
    ------
    DataError
        The message names the path, the conflicting options, and what to do.
    """
    written = {name: path for name, path in files.items() if path is not None}
    whole = written | {name: path for name, path in (stores or {}).items() if path is not None}
    filled = {name: path for name, path in {**(folders or {}), **(stores or {})}.items() if path is not None}
    read = {name: path for name, path in (reads or {}).items() if path is not None}
    inputs = {os.path.realpath(path): name for name, path in read.items()}
    taken: dict[str, str] = {}
    for name, path in (written | filled).items():
        place = os.path.realpath(path)
        key = place.casefold()  # the same file on a case-insensitive file system
        other = inputs.get(place) or taken.get(key)
        if other:
            raise DataError(f"{path} would be replaced: it is both {other} and {name}; use another name")
        taken[key] = name
    _refuse_nested(whole, read | written | filled)
    for name, path in written.items():
        loop = Path(os.path.realpath(path)).is_symlink()  # a loop of links, for which `exists` returns False
        if loop or (path.exists() and not path.is_file()):
            raise DataError(f"{path} ({name}) is not a regular file: give the name of a file to write")
        _refuse_same(path, name, read)
    for name, path in filled.items():
        if os.path.lexists(path) and not path.is_dir():
            raise DataError(f"{path} ({name}) is not a folder: give the name of a folder to fill")
    _refuse_images(written, filled, images)
    for name, path in filled.items():
        _refuse_links(path, name)
    for name, path in [*written.items(), *filled.items()]:
        _check_writable(path.parent if name in written else path, path)
        exists = path.exists() if name in written else path.is_dir() and any(path.iterdir())
        if exists and not overwrite:
            what = "exists" if name in written else "is not empty"
            advice = "" if overwrite is None else ", or `overwrite=True`"
            raise DataError(f"{path} {what}: give another {_option(name)}{advice}")


def _option(name: str) -> str:
    """Return the option or argument that decides a path, from its name in `Paths`; `output` if the name has none."""
    return next((word for word in name.split() if word.startswith(("--", "`")) or word.isupper()), "`output`")


def check_pictures(files: Paths, searched: Iterable[Path]) -> None:
    """Raise DataError for images, or folders of them, below a folder in which later runs would find them as inputs.

    Parameters
    ----------
    files
        Images, and folders of images, that the command writes.
    searched
        Folders that commands search for images, with their subfolders; see `cloudrt.images.image.find_images`.
    """
    roots = [Path(os.path.realpath(folder)) for folder in searched]
    for name, path in files.items():
        place = Path(os.path.realpath(path)) if path is not None else None
        for root in roots:
            if (
                place
                and place.is_relative_to(root)
                and not any(part.startswith(".") for part in place.relative_to(root).parts)
            ):
                raise DataError(
                    f"{path} ({name}) lies in {root}, where later runs would read it as input: give another "
                    f"{_option(name)}"
                )


def check_suffixes(files: Paths, suffix: str) -> None:
    """Raise DataError for an output whose name does not end in `suffix`, such as "-" or a folder."""
    for name, path in files.items():
        if path is not None and path.suffix.lower() != suffix:
            raise DataError(f"{name} {path}: the file name must end in {suffix}")


def _refuse_same(path: Path, name: str, read: Mapping[str, Path]) -> None:
    """Raise DataError if an output is an input under another name: a hard link, or a name that differs in case."""
    for other, source in read.items():
        if path.exists() and source.exists() and path.samefile(source):
            raise DataError(f"{path} would be replaced: it is both {other} and {name}; use another name")


def _refuse_nested(whole: Mapping[str, Path], paths: Mapping[str, Path]) -> None:
    """Raise DataError if an input or output lies below an output that is a file or a store."""
    places = {os.path.realpath(path).casefold(): name for name, path in whole.items()}
    for name, path in paths.items():
        parents = map(str, Path(os.path.realpath(path).casefold()).parents)
        around = next((places[parent] for parent in parents if parent in places), None)
        if around is not None:
            raise DataError(f"{path} ({name}) lies below {around} {whole[around]}: use another name")


def _refuse_links(folder: Path, name: str) -> None:
    """Raise DataError if there is a link below an output folder: what it points to would be replaced."""
    for parent, folders, files in os.walk(folder):
        link = next((path for one in (*folders, *files) if (path := Path(parent, one)).is_symlink()), None)
        if link is not None:
            raise DataError(f"{link} is a link, and outputs could replace its target: give another {_option(name)}")


def _refuse_images(written: Mapping[str, Path], filled: Mapping[str, Path], images: Iterable[Path]) -> None:
    """Raise DataError if an output is one of the images, or an output folder contains images."""
    there = {(stat.st_dev, stat.st_ino): name for name, path in written.items() if (stat := _stat(path))}
    roots = {os.path.realpath(path): name for name, path in filled.items() if path.exists()}
    if not there and not roots:
        return
    seen: set[str] = set()
    for image in images:
        stat = _stat(image)
        if stat and (stat.st_dev, stat.st_ino) in there:
            name = there[stat.st_dev, stat.st_ino]
            raise DataError(f"{image} is one of the images and would be replaced: give another {_option(name)}")
        folder = str(image.parent)
        if folder not in seen and "\0" not in folder:  # no folder has such a name
            seen.add(folder)
            place = Path(os.path.realpath(folder))
            inside = next((root for root in roots if place.is_relative_to(root)), None)
            if inside is not None:
                raise DataError(
                    f"{roots[inside]} {inside} contains input images, which outputs could replace: give another folder"
                )


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (OSError, ValueError):
        return None


def _check_writable(folder: Path, path: Path) -> None:
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise DataError(f"{path} cannot be written: {there} is not a folder")
    if not os.access(there, os.W_OK):
        raise DataError(f"{path} cannot be written: no permission to write to {there}")
